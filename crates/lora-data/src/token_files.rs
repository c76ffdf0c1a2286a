//! Where encoded rows are found and kept, so that a file is tokenized once.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use lora_spec::{DataSpec, SourceDir, SourceFile, TrainFiles};
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use crate::encoded_rows::EncodedRows;
use crate::file_format::FileKind;
use crate::{DataError, Tokenizer, token_file};

/// How long to wait for another process that encodes the same rows.
const WAIT_LIMIT: Duration = Duration::from_secs(600);
/// The age after which an unfinished file or a lock belongs to no process.
const STALE_AFTER: Duration = Duration::from_secs(24 * 3600);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// What the names of token files end with.
const EXTENSION: &str = "safetensors";

/// Where the encoded rows of dataset files are.
///
/// The name of a token file is a hash of all that its rows depend on: the bytes of the dataset, the
/// tokenizer and its template, the settings of the rows, and this build. A file that cannot be used
/// counts as missing.
#[derive(Clone, Copy, Default)]
pub struct TokenFiles<'a> {
    /// Token files that came with the job.
    pub given: Option<&'a SourceDir>,
    /// The directory in which rows are looked up, and kept for the next time.
    pub cache: Option<&'a TokenCache>,
    /// Is told how far a dataset is tokenized.
    pub progress: Option<TokenizingProgress<'a>>,
}

/// Is called with the name of a dataset that is being tokenized, and the share that is done.
pub type TokenizingProgress<'a> = &'a (dyn Fn(&Path, f64) + Sync);

/// A directory of token files. Several processes may share it.
#[derive(Debug, Clone)]
pub struct TokenCache {
    dir: PathBuf,
    max_bytes: u64,
}

impl TokenFiles<'_> {
    /// Returns the encoded rows of `file`, whose bytes have this SHA-256. Also returns their token
    /// file, if there is one, and why it could not be written.
    pub(crate) fn rows(
        &self,
        file: &SourceFile,
        (kind, sha256): (FileKind, &str),
        tokenizer: &Tokenizer,
        data: &DataSpec,
    ) -> Result<(EncodedRows, Option<SourceFile>, Option<String>), DataError> {
        let progress = |done| self.progress.iter().for_each(|show| show(file.name(), done));
        let encode = || EncodedRows::from_file(file, sha256, tokenizer, data, &progress);
        let key = key((kind, sha256), tokenizer, data);
        let name = format!("{key}.{EXTENSION}");
        if let Some(given) = self.given.map(|dir| dir.file(&name))
            && let Ok(rows) = token_file::read(given.path(), &key)
        {
            return Ok((rows, Some(given), None));
        }
        let Some(cache) = self.cache else { return Ok((encode()?, None, None)) };
        let kept = SourceFile::from(cache.dir.join(&name));
        let look_up = || token_file::read(kept.path(), &key).inspect(|_| touch(kept.path()));
        if let Ok(rows) = look_up() {
            return Ok((rows, Some(kept), None));
        }
        progress(0.0);
        let _lock = cache.lock(&key);
        if let Ok(rows) = look_up() {
            return Ok((rows, Some(kept), None));
        }
        let rows = encode()?;
        match cache.keep(kept.path(), &key, &rows) {
            Ok(()) => Ok((rows, Some(kept), None)),
            Err(error) => {
                let dir = cache.dir.display();
                tracing::warn!(%dir, %error, "tokens are not kept");
                let problem = format!("the tokens of {file} are not kept in {dir}: {error}");
                Ok((rows, None, Some(problem)))
            }
        }
    }
}

impl TokenCache {
    /// Creates a cache in `dir`, which is created when it is needed. The least recently used files
    /// are removed once all files have more than `max_bytes`.
    pub fn new(dir: impl Into<PathBuf>, max_bytes: u64) -> Self {
        Self { dir: dir.into(), max_bytes }
    }

    /// Waits until no other process encodes the rows of `key`. Without a lock they are encoded
    /// twice, which is only slower.
    fn lock(&self, key: &str) -> Option<KeyLock> {
        fs::create_dir_all(&self.dir).ok()?;
        let path = self.dir.join(format!("{key}.lock"));
        let started = Instant::now();
        loop {
            let file = File::create(&path).ok()?;
            match file.try_lock() {
                Ok(()) => return Some(KeyLock { path, _file: file }),
                Err(TryLockError::WouldBlock) if started.elapsed() < WAIT_LIMIT => sleep(POLL_INTERVAL),
                Err(_) => return None,
            }
        }
    }

    fn keep(&self, path: &Path, key: &str, rows: &EncodedRows) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let mut file = NamedTempFile::new_in(&self.dir)?;
        token_file::write(file.as_file_mut(), key, rows)?;
        file.persist(path)?;
        if let Err(error) = self.evict(path) {
            // The new file is there in any case.
            tracing::warn!(dir = %self.dir.display(), %error, "old tokens are not removed");
        }
        Ok(())
    }

    /// Removes the least recently used files, except `newest`, and what killed processes left.
    fn evict(&self, newest: &Path) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            // Another process may remove it meanwhile.
            let Ok(metadata) = path.metadata() else { continue };
            let modified = metadata.modified()?;
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                files.push((modified, metadata.len(), path));
            } else if modified.elapsed().is_ok_and(|age| age > STALE_AFTER) {
                remove(&path)?;
            }
        }
        files.sort();
        let mut left = files.iter().map(|(_, bytes, _)| bytes).sum::<u64>();
        for (_, bytes, path) in files.into_iter().filter(|(_, _, path)| path != newest) {
            if left <= self.max_bytes {
                break;
            }
            remove(&path)?;
            left -= bytes;
        }
        Ok(())
    }
}

/// Removes a file, unless another process has removed it.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The lock of a key. Its file is removed on drop.
struct KeyLock {
    path: PathBuf,
    _file: File,
}

impl Drop for KeyLock {
    fn drop(&mut self) {
        // A lock file that remains is only in the way of a user who reads the directory.
        let _ = fs::remove_file(&self.path);
    }
}

/// Notes that the file was used. If this fails, it is removed earlier.
fn touch(path: &Path) {
    let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Returns the hash of all that the encoded rows depend on, in hex.
fn key((kind, sha256): (FileKind, &str), tokenizer: &Tokenizer, data: &DataSpec) -> String {
    // Every other setting counts, also one that is added later.
    let rows = DataSpec {
        train: TrainFiles::default(),
        train_weights: Vec::new(),
        eval: None,
        max_length: 0,
        long_rows: Default::default(),
        packing: false,
        shuffle: false,
        ..data.clone()
    };
    let all = json!({
        "build": env!("LORA_DATA_BUILD"),
        "dataset": sha256,
        "kind": kind.name(),
        "tokenizer": tokenizer.sha256(),
        "data": rows,
    });
    hex::encode(Sha256::digest(all.to_string()))
}
