//! Where a job's inputs come from, and the files of earlier jobs that need not be fetched again.
//!
//! The cache directory may be shared by several workers of a host:
//! - `objects/<key>`: every file once, by what tells its content (SHA-256, or a store's identity);
//! - `sets/<id>/<name>`: files that belong together under their own names, hard links to objects. The id is a hash of
//!   names and keys, so the same files have the same path again. Who uses a set holds a shared lock on its directory;
//! - `partial/<key>/content`: a file on its way. Who fetches it holds the directory's exclusive lock;
//! - `records/<id>`: which files a remote base consists of.
//!
//! A file is in a set or among the objects only once it is whole, so nothing has to be repaired after a crash.

mod base;
mod cache;
mod error;
mod evict;
mod hub;
mod object_store;
mod partial_file;
mod selection;
mod source;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::Arc;

use lora_proto::{DigestBuilder, v1};
use tonic::transport::Channel;

use self::base::{BaseResolver, BaseSource};
use self::cache::{CacheDir, FileLock};
pub(crate) use self::error::FetchError;
use self::hub::Hub;
use self::source::{FileSet, RemoteFile, Source};

/// The file cache of a worker, and its ways to base models. A clone is the same cache.
#[derive(Clone)]
pub(crate) struct InputFetcher {
    cache: Arc<CacheDir>,
    base_resolver: Arc<BaseResolver>,
}

/// A job's inputs on this machine. They stay in the cache for as long as this lives.
pub(crate) struct LocalInputs {
    /// Directory of the base model.
    pub(crate) base: PathBuf,
    /// The training rows.
    pub(crate) train: PathBuf,
    /// The evaluation rows.
    pub(crate) eval: Option<PathBuf>,
    /// Directory of the adapter to start from.
    pub(crate) init_from: Option<PathBuf>,
    _locks: Vec<FileLock>,
}

impl InputFetcher {
    /// The cache in `dir`, which may grow to `max_bytes`. A job may name a base by path under one of `model_roots`.
    ///
    /// The hub's address and token are `HF_ENDPOINT` and `HF_TOKEN`; object stores are configured by `AWS_*`, `GOOGLE_*`
    /// and `AZURE_*`.
    ///
    /// # Errors
    /// A directory that cannot be written, or a relative path in `model_roots`.
    pub(crate) fn open(dir: &Path, max_bytes: u64, model_roots: Vec<PathBuf>) -> Result<Self, FetchError> {
        let hub = Hub::new(env::var("HF_ENDPOINT").ok(), env::var("HF_TOKEN").ok());
        let stores = env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix)))
            .collect();
        Self::with(dir, max_bytes, model_roots, hub, stores)
    }

    fn with(
        dir: &Path,
        max_bytes: u64,
        model_roots: Vec<PathBuf>,
        hub: Hub,
        stores: Vec<(String, String)>,
    ) -> Result<Self, FetchError> {
        // HTTP clients take the process's provider; one that is there already is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let base_resolver = BaseResolver::new(model_roots, hub, stores)?;
        Ok(Self { cache: Arc::new(CacheDir::open(dir, max_bytes)?), base_resolver: Arc::new(base_resolver) })
    }

    /// Fetches what is missing of `inputs`. Dropping the future stops it; the next call goes on from there.
    ///
    /// # Errors
    /// The first input that cannot be had.
    pub(crate) async fn inputs(
        &self,
        inputs: &v1::Inputs,
        channel: Channel,
    ) -> Result<LocalInputs, FetchError> {
        let missing = |field| move || FetchError::refused(field, "is missing in the job's inputs");
        let files = |field, files: &[v1::StoredFile]| stored(field, files, channel.clone());
        let file =
            |field, file: &v1::StoredFile| Ok((files(field, slice::from_ref(file))?, file.name.clone()));
        let train = file("data.train", inputs.train.as_ref().ok_or_else(missing("data.train"))?)?;
        let eval = inputs.eval.as_ref().map(|eval| file("data.eval", eval)).transpose()?;
        let adapter = Some(&inputs.init_from).filter(|files| !files.is_empty());
        let adapter = adapter.map(|adapter| files("adapter.init_from", adapter)).transpose()?;
        let source = inputs.base.as_ref().and_then(|base| base.source.as_ref());
        let base = match source.ok_or_else(missing("model.base"))? {
            v1::base::Source::Files(set) => BaseSource::Remote(files("model.base", &set.files)?),
            v1::base::Source::Url(url) => {
                BaseSource::Remote(self.base_resolver.at_url(url, &self.cache).await?)
            }
            v1::base::Source::Path(path) => BaseSource::Local(self.base_resolver.at_path(Path::new(path))?),
        };

        let mut locks = Vec::new();
        let base = match base {
            BaseSource::Local(path) => path,
            BaseSource::Remote(file_set) => self.lock_set(file_set, &mut locks).await?,
        };
        let train = self.lock_set(train.0, &mut locks).await?.join(train.1);
        let eval = match eval {
            Some((file_set, name)) => Some(self.lock_set(file_set, &mut locks).await?.join(name)),
            None => None,
        };
        let init_from = match adapter {
            Some(file_set) => Some(self.lock_set(file_set, &mut locks).await?),
            None => None,
        };
        // All are held before any other goes: none of them makes room for another.
        let bytes = locks.iter().map(|(lock, file_set)| self.cache.missing_bytes(lock, file_set)).sum();
        self.cache.make_room(bytes).await;
        for (lock, file_set) in &locks {
            self.cache.fill(lock, file_set).await?;
        }
        let locks = locks.into_iter().map(|(lock, _)| lock).collect();
        Ok(LocalInputs { base, train, eval, init_from, _locks: locks })
    }

    /// The bytes of a checkpoint, which is not kept.
    ///
    /// # Errors
    /// As of a transfer.
    pub(crate) async fn checkpoint(
        &self,
        checkpoint: &v1::Checkpoint,
        channel: Channel,
    ) -> Result<Vec<u8>, FetchError> {
        let (name, digest) = (format!("step-{}", checkpoint.step), checkpoint.digest.clone());
        let file = remote_file("checkpoint", &v1::StoredFile { name, digest })?;
        self.cache.make_room(file.size).await;
        self.cache.read_once(&Source::Coordinator(channel), &file).await
    }

    async fn lock_set(
        &self,
        file_set: FileSet,
        locks: &mut Vec<(FileLock, FileSet)>,
    ) -> Result<PathBuf, FetchError> {
        let set = self.cache.lock_set(&file_set.files).await?;
        let dir = set.dir.clone();
        locks.push((set, file_set));
        Ok(dir)
    }
}

/// Files of the coordinator's store.
fn stored(field: &'static str, files: &[v1::StoredFile], channel: Channel) -> Result<FileSet, FetchError> {
    let files = files.iter().map(|file| remote_file(field, file)).collect::<Result<Vec<_>, _>>()?;
    let mut names = BTreeSet::new();
    if let Some(file) = files.iter().find(|file| !names.insert(&file.name)) {
        return Err(FetchError::refused(field, format!("file {} is there twice", file.name)));
    }
    if files.is_empty() {
        return Err(FetchError::refused(field, "has no files"));
    }
    Ok(FileSet { source: Source::Coordinator(channel), files })
}

fn remote_file(field: &'static str, file: &v1::StoredFile) -> Result<RemoteFile, FetchError> {
    let name = file.name.clone();
    if !is_bare(&name) {
        let name: String = name.chars().take(64).collect();
        let message = format!(
            "{name:?} is no name for a file: letters, digits, `-`, `_` and `.`, not starting with a dot, at most 255"
        );
        return Err(FetchError::refused(field, message));
    }
    match &file.digest {
        Some(digest) if digest.sha256.len() == 32 => {
            Ok(RemoteFile { name, size: digest.size, key: digest.hex(), etag: None })
        }
        _ => Err(FetchError::refused(field, format!("file {name} comes without its SHA-256"))),
    }
}

/// Names content that has no known SHA-256, by what tells it apart.
fn key(kind: &str, identity: &[impl AsRef<str>]) -> String {
    let lines: Vec<&str> = identity.iter().map(AsRef::as_ref).collect();
    format!("{kind}-{}", DigestBuilder::of_bytes(lines.join("\n").as_bytes()).hex())
}

/// Whether `name` can only be a file in the directory it is joined to.
fn is_bare(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=255).contains(&name.len()) && !name.starts_with('.') && name.chars().all(legal)
}
