//! The cache directory.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use futures_util::{StreamExt, TryStreamExt, stream};
use lora_data::TokenCache;
use lora_proto::DigestBuilder;
use tokio::time::sleep;
use tracing::{info, warn};

use super::FetchError;
use super::dir_lock::lock_dir;
use super::evict;
use super::source::{FileSet, RemoteFile, Source};

/// The number of files that are fetched at the same time.
const MAX_CONCURRENT_FETCHES: usize = 4;
/// The interval at which another worker's lock is polled.
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long another worker may hold a lock without making progress.
const WAIT_TIMEOUT: Duration = Duration::from_secs(600);

/// Which part of the cache the tokens of datasets may take.
const TOKENS_SHARE: u64 = 10;

/// The cache directory.
pub(super) struct CacheDir {
    root: PathBuf,
    max_bytes: u64,
    tokens: TokenCache,
}

/// A locked directory of the cache. It is not removed while this value lives.
pub(super) struct DirLock {
    pub(super) dir: PathBuf,
    _lock: File,
}

impl CacheDir {
    pub(super) fn open(dir: &Path, max_bytes: u64) -> Result<Self, FetchError> {
        fs::create_dir_all(dir).map_err(FetchError::at(dir))?;
        let root = dir.canonicalize().map_err(FetchError::at(dir))?;
        for name in ["objects", "partial", "records", "sets"] {
            let dir = root.join(name);
            fs::create_dir_all(&dir).map_err(FetchError::at(&dir))?;
        }
        let tokens = TokenCache::new(root.join("tokens"), max_bytes / TOKENS_SHARE);
        let cache = Self { root, max_bytes, tokens };
        evict::remove_stale(&cache.root);
        cache.remove_stale_records();
        evict::make_room(&cache.root, max_bytes, 0);
        Ok(cache)
    }

    pub(super) fn token_cache(&self) -> &TokenCache {
        &self.tokens
    }

    /// Locks the set of `files`, which may still be incomplete.
    pub(super) async fn lock_set(&self, files: &[RemoteFile]) -> Result<DirLock, FetchError> {
        let dir = self.root.join("sets").join(set_id(files));
        let started = Instant::now();
        loop {
            if let Some(lock) = lock_dir(&dir, File::try_lock_shared).map_err(FetchError::at(&dir))? {
                // Eviction starts with the set that has not been used for longest.
                lock.set_modified(SystemTime::now()).map_err(FetchError::at(&dir))?;
                return Ok(DirLock { dir, _lock: lock });
            }
            if started.elapsed() > WAIT_TIMEOUT {
                return Err(FetchError::Busy { file: dir.display().to_string() });
            }
            sleep(LOCK_POLL_INTERVAL).await;
        }
    }

    /// The number of bytes that [`fill`](Self::fill) would fetch.
    pub(super) fn missing_bytes(&self, lock: &DirLock, file_set: &FileSet) -> u64 {
        let missing = |file: &&RemoteFile| {
            !is_whole(&lock.dir.join(&file.name), file) && !is_whole(&self.object(file), file)
        };
        let bytes =
            |file: &RemoteFile| file.size.saturating_sub(size_of(&self.partial(file).join("content")));
        file_set.files.iter().filter(missing).map(bytes).sum()
    }

    /// Removes the least recently used entries until `bytes` more fit.
    pub(super) async fn make_room(&self, bytes: u64) {
        let (root, max_bytes) = (self.root.clone(), self.max_bytes);
        let removal = tokio::task::spawn_blocking(move || evict::make_room(&root, max_bytes, bytes));
        if let Err(error) = removal.await {
            warn!(%error, "making room in the cache failed");
        }
    }

    /// Fetches the missing files of the set.
    pub(super) async fn fill(&self, lock: &DirLock, file_set: &FileSet) -> Result<(), FetchError> {
        stream::iter(&file_set.files)
            .map(Ok)
            .try_for_each_concurrent(MAX_CONCURRENT_FETCHES, |file| {
                let to = lock.dir.join(&file.name);
                async move {
                    match is_whole(&to, file) {
                        true => Ok(()),
                        false => self.fetch(&*file_set.source, file, &to).await,
                    }
                }
            })
            .await
    }

    /// Returns the bytes of a file that is not kept in the cache.
    pub(super) async fn read_once(
        &self,
        source: &dyn Source,
        file: &RemoteFile,
    ) -> Result<Vec<u8>, FetchError> {
        loop {
            let object = self.object(file);
            if is_whole(&object, file) {
                return tokio::fs::read(&object).await.map_err(FetchError::at(&object));
            }
            let Some(partial) = self.download(source, file).await? else { continue };
            let content = partial.dir.join("content");
            let bytes = tokio::fs::read(&content).await.map_err(FetchError::at(&content))?;
            fs::remove_dir_all(&partial.dir).map_err(FetchError::at(&partial.dir))?;
            return Ok(bytes);
        }
    }

    /// Puts the file at `to`, fetching it if it is not an object yet.
    async fn fetch(&self, source: &dyn Source, file: &RemoteFile, to: &Path) -> Result<(), FetchError> {
        let object = self.object(file);
        loop {
            if is_whole(&object, file) && link(&object, to, file).map_err(FetchError::at(to))? {
                return Ok(());
            }
            let Some(partial) = self.download(source, file).await? else { continue };
            let content = partial.dir.join("content");
            // The link comes first: an object that is in no set may be evicted at any time.
            link(&content, to, file).map_err(FetchError::at(to))?;
            fs::rename(&content, &object).map_err(FetchError::at(&object))?;
            return fs::remove_dir_all(&partial.dir).map_err(FetchError::at(&partial.dir));
        }
    }

    /// Downloads the file and returns its locked directory. Returns `None` once another worker has
    /// made the file an object.
    async fn download(&self, source: &dyn Source, file: &RemoteFile) -> Result<Option<DirLock>, FetchError> {
        let Some(partial) = self.lock_partial(file).await? else { return Ok(None) };
        let (started, name, bytes) = (Instant::now(), file.name.as_str(), file.size);
        info!(name, bytes, "fetching a file");
        let content = partial.dir.join("content");
        source.download(file, &content).await?;
        if !is_whole(&content, file) {
            fs::remove_file(&content).map_err(FetchError::at(&content))?;
            return Err(FetchError::transient(name, "the file does not have the announced size; try again"));
        }
        info!(name, bytes, seconds = started.elapsed().as_secs_f64(), "fetched a file");
        Ok(Some(partial))
    }

    async fn lock_partial(&self, file: &RemoteFile) -> Result<Option<DirLock>, FetchError> {
        let dir = self.partial(file);
        let (mut seen, mut since) = (0, None);
        loop {
            let lock = lock_dir(&dir, File::try_lock).map_err(FetchError::at(&dir))?;
            let has_object = is_whole(&self.object(file), file);
            match lock {
                Some(_) if has_object => {
                    fs::remove_dir_all(&dir).map_err(FetchError::at(&dir))?;
                    return Ok(None);
                }
                Some(lock) => return Ok(Some(DirLock { dir, _lock: lock })),
                None if has_object => return Ok(None),
                None => {}
            }
            let size = size_of(&dir.join("content"));
            let since = since.get_or_insert_with(|| {
                info!(name = file.name, "waiting for another fetch of the same file");
                Instant::now()
            });
            if size != seen {
                (seen, *since) = (size, Instant::now());
            } else if since.elapsed() > WAIT_TIMEOUT {
                return Err(FetchError::Busy { file: file.name.clone() });
            }
            sleep(LOCK_POLL_INTERVAL).await;
        }
    }

    fn object(&self, file: &RemoteFile) -> PathBuf {
        self.root.join("objects").join(&file.key)
    }

    fn partial(&self, file: &RemoteFile) -> PathBuf {
        self.root.join("partial").join(&file.key)
    }

    fn remove_stale_records(&self) {
        for path in evict::entries(&self.root.join("records")) {
            let used =
                read_record(&path).is_some_and(|files| self.root.join("sets").join(set_id(&files)).is_dir());
            if !used && evict::is_stale(&path) {
                evict::remove(&path);
            }
        }
    }
}

#[cfg(feature = "remote-base")]
impl CacheDir {
    /// Returns the files of the remote base `id`, if a record of them was kept.
    pub(super) fn record(&self, id: &str) -> Option<Vec<RemoteFile>> {
        read_record(&self.root.join("records").join(id))
    }

    pub(super) fn keep_record(&self, id: &str, files: &[RemoteFile]) -> Result<(), FetchError> {
        let dir = self.root.join("records");
        let keep = || {
            use std::io::Write as _;
            let mut file = tempfile::NamedTempFile::new_in(&dir)?;
            file.write_all(&serde_json::to_vec(files)?)?;
            file.persist(dir.join(id))?;
            Ok(())
        };
        keep().map_err(FetchError::at(&dir))
    }
}

/// Makes `to` a hard link to `from`. Returns false if `from` does not exist. A file of another size
/// at `to` is replaced.
fn link(from: &Path, to: &Path, file: &RemoteFile) -> io::Result<bool> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    loop {
        match fs::hard_link(from, to) {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        if is_whole(to, file) {
            return Ok(true);
        }
        fs::remove_file(to)?;
    }
}

fn read_record(path: &Path) -> Option<Vec<RemoteFile>> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn set_id(files: &[RemoteFile]) -> String {
    let mut lines: Vec<String> = files.iter().map(|file| format!("{} {}\n", file.name, file.key)).collect();
    lines.sort();
    let mut id = DigestBuilder::of_bytes(lines.concat().as_bytes()).hex();
    id.truncate(32);
    id
}

/// Whether `path` is a file of the expected size.
fn is_whole(path: &Path, file: &RemoteFile) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == file.size)
}

fn size_of(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.len())
}
