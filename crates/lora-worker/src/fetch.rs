//! Fetches the inputs of jobs, and caches them for later jobs.
//!
//! Several workers of a host may share the cache directory:
//! - `objects/<key>`: every file once, named by an identity of its content (the SHA-256, or a
//!   store's identity);
//! - `sets/<id>/<name>`: files that belong together, under their own names, as hard links to
//!   objects. The id is a hash of names and keys, so the same files always have the same path. A
//!   user of a set holds a shared lock on its directory;
//! - `partial/<key>/content`: a file that is being fetched. The fetching worker holds the
//!   directory's exclusive lock;
//! - `records/<id>`: the list of files of a remote base;
//! - `tokens/`: tokens of datasets that this host has tokenized.
//!
//! A file becomes an object or part of a set only once it is complete, so no repair is needed after
//! a crash.

mod cache;
mod dir_lock;
mod error;
mod evict;
mod model_roots;
#[cfg(feature = "remote-base")]
mod remote;
mod source;
#[cfg(test)]
#[cfg(feature = "remote-base")]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::Arc;

use lora_data::TokenCache;
use lora_proto::file_name::check_file_name;
use lora_proto::v1;
use lora_spec::{JobFiles, JobSpec, SourceDir, SourceFile};
use tonic::transport::Channel;

use self::cache::{CacheDir, DirLock};
pub(crate) use self::error::FetchError;
use self::model_roots::ModelRoots;
#[cfg(feature = "remote-base")]
use self::remote::RemoteBases;
use self::source::{CoordinatorStore, FileSet, RemoteFile};

/// The file cache of a worker, and its sources of base models. A clone shares the cache.
#[derive(Clone)]
pub(crate) struct InputFetcher {
    cache: Arc<CacheDir>,
    model_roots: Arc<ModelRoots>,
    #[cfg(feature = "remote-base")]
    remote: Arc<RemoteBases>,
}

/// Where a base comes from.
enum BaseSource {
    Local(PathBuf),
    Remote(FileSet),
}

/// The fetched files of a job, by their paths. They stay in the cache while this value lives.
pub(crate) struct FetchedFiles {
    /// Directory of the base model.
    pub(crate) base: PathBuf,
    /// The files of training rows.
    pub(crate) train: Vec<PathBuf>,
    /// The evaluation rows.
    pub(crate) eval: Option<PathBuf>,
    /// The directory of the adapter to start from.
    pub(crate) init_from: Option<PathBuf>,
    /// The directory of the token files.
    pub(crate) tokens: Option<PathBuf>,
    _locks: Vec<DirLock>,
}

impl FetchedFiles {
    /// Returns the files under the names that they have in `job`.
    pub(crate) fn of_job(&self, job: &JobSpec) -> JobFiles {
        let data_file = |in_job: &Path, path: &Path| {
            let uploaded = path.file_name().unwrap_or_default().to_string_lossy();
            SourceFile::uploaded(in_job, &uploaded, path)
        };
        let (eval, init_from) = (job.data.eval.as_ref(), job.adapter.init_from.as_ref());
        JobFiles {
            base: SourceDir::new(&job.model.base, &self.base),
            train: job
                .data
                .train
                .iter()
                .zip(&self.train)
                .map(|(in_job, path)| data_file(in_job, path))
                .collect(),
            eval: eval.zip(self.eval.as_ref()).map(|(in_job, path)| data_file(in_job, path)),
            init_from: init_from.zip(self.init_from.as_ref()).map(|(dir, path)| SourceDir::new(dir, path)),
            tokens: self.tokens.as_ref().map(|path| SourceDir::new("inputs.tokens", path)),
        }
    }
}

impl InputFetcher {
    /// Opens the cache in `dir`, which may grow to `max_bytes`. A job may name a base by its path
    /// under one of `model_roots`. The settings of the hub and of object stores come from the
    /// environment.
    ///
    /// # Errors
    /// The directory cannot be written, or `model_roots` contains a relative path.
    pub(crate) fn open(dir: &Path, max_bytes: u64, model_roots: Vec<PathBuf>) -> Result<Self, FetchError> {
        Self::with(
            dir,
            max_bytes,
            model_roots,
            #[cfg(feature = "remote-base")]
            RemoteBases::from_environment(),
        )
    }

    fn with(
        dir: &Path,
        max_bytes: u64,
        model_roots: Vec<PathBuf>,
        #[cfg(feature = "remote-base")] remote: RemoteBases,
    ) -> Result<Self, FetchError> {
        Ok(Self {
            model_roots: Arc::new(ModelRoots::new(model_roots)?),
            cache: Arc::new(CacheDir::open(dir, max_bytes)?),
            #[cfg(feature = "remote-base")]
            remote: Arc::new(remote),
        })
    }

    /// The directory for tokens that do not come with a job.
    pub(crate) fn token_cache(&self) -> &TokenCache {
        self.cache.token_cache()
    }

    /// Fetches the missing files of `inputs`. Dropping the future stops the fetch; the next call
    /// resumes it.
    ///
    /// # Errors
    /// The error of the first input that cannot be fetched.
    pub(crate) async fn inputs(
        &self,
        inputs: &v1::Inputs,
        channel: Channel,
    ) -> Result<FetchedFiles, FetchError> {
        let missing = |field| move || FetchError::refused(field, "is missing from the job's inputs");
        let files = |field, files: &[v1::StoredFile]| stored(field, files, channel.clone());
        let file =
            |field, file: &v1::StoredFile| Ok((files(field, slice::from_ref(file))?, file.name.clone()));
        let train = inputs.train.iter().map(|train| file("data.train", train));
        let train = train.collect::<Result<Vec<_>, FetchError>>()?;
        if train.is_empty() {
            return Err(missing("data.train")());
        }
        let eval = inputs.eval.as_ref().map(|eval| file("data.eval", eval)).transpose()?;
        let adapter = Some(&inputs.init_from).filter(|files| !files.is_empty());
        let adapter = adapter.map(|adapter| files("adapter.init_from", adapter)).transpose()?;
        let tokens = Some(&inputs.tokens).filter(|files| !files.is_empty());
        let tokens = tokens.map(|tokens| files("inputs.tokens", tokens)).transpose()?;
        let source = inputs.base.as_ref().and_then(|base| base.source.as_ref());
        let base = match source.ok_or_else(missing("model.base"))? {
            v1::base::Source::Files(set) => BaseSource::Remote(files("model.base", &set.files)?),
            #[cfg(feature = "remote-base")]
            v1::base::Source::Url(url) => BaseSource::Remote(self.remote.file_set(url, &self.cache).await?),
            #[cfg(not(feature = "remote-base"))]
            v1::base::Source::Url(_) => {
                let message = "this build cannot read URLs; build lora-worker with the feature remote-base";
                return Err(FetchError::refused(model_roots::FIELD, message));
            }
            v1::base::Source::Path(path) => BaseSource::Local(self.model_roots.resolve(Path::new(path))?),
        };

        let mut locks = Vec::new();
        let base = match base {
            BaseSource::Local(path) => path,
            BaseSource::Remote(file_set) => self.lock_set(file_set, &mut locks).await?,
        };
        let mut train_paths = Vec::with_capacity(train.len());
        for (file_set, name) in train {
            train_paths.push(self.lock_set(file_set, &mut locks).await?.join(name));
        }
        let eval = match eval {
            Some((file_set, name)) => Some(self.lock_set(file_set, &mut locks).await?.join(name)),
            None => None,
        };
        let init_from = match adapter {
            Some(file_set) => Some(self.lock_set(file_set, &mut locks).await?),
            None => None,
        };
        let tokens = match tokens {
            Some(file_set) => Some(self.lock_set(file_set, &mut locks).await?),
            None => None,
        };
        // All sets are locked before files are evicted, so that no input evicts another one.
        let bytes = locks.iter().map(|(lock, file_set)| self.cache.missing_bytes(lock, file_set)).sum();
        self.cache.make_room(bytes).await;
        for (lock, file_set) in &locks {
            self.cache.fill(lock, file_set).await?;
        }
        let locks = locks.into_iter().map(|(lock, _)| lock).collect();
        Ok(FetchedFiles { base, train: train_paths, eval, init_from, tokens, _locks: locks })
    }

    /// Returns the bytes of a checkpoint, which is not kept in the cache.
    ///
    /// # Errors
    /// The errors of a transfer.
    pub(crate) async fn checkpoint(
        &self,
        checkpoint: &v1::Checkpoint,
        channel: Channel,
    ) -> Result<Vec<u8>, FetchError> {
        let (name, digest) = (format!("step-{}", checkpoint.step), checkpoint.digest.clone());
        let file = remote_file("checkpoint", &v1::StoredFile { name, digest })?;
        self.cache.make_room(file.size).await;
        self.cache.read_once(&CoordinatorStore(channel), &file).await
    }

    async fn lock_set(
        &self,
        file_set: FileSet,
        locks: &mut Vec<(DirLock, FileSet)>,
    ) -> Result<PathBuf, FetchError> {
        let lock = self.cache.lock_set(&file_set.files).await?;
        let dir = lock.dir.clone();
        locks.push((lock, file_set));
        Ok(dir)
    }
}

/// The set of `files` in the coordinator's store.
fn stored(field: &'static str, files: &[v1::StoredFile], channel: Channel) -> Result<FileSet, FetchError> {
    let files = files.iter().map(|file| remote_file(field, file)).collect::<Result<Vec<_>, _>>()?;
    let mut names = BTreeSet::new();
    if let Some(file) = files.iter().find(|file| !names.insert(&file.name)) {
        return Err(FetchError::refused(field, format!("file {} is listed twice", file.name)));
    }
    if files.is_empty() {
        return Err(FetchError::refused(field, "has no files"));
    }
    Ok(FileSet { source: Box::new(CoordinatorStore(channel)), files })
}

fn remote_file(field: &'static str, file: &v1::StoredFile) -> Result<RemoteFile, FetchError> {
    let name = file.name.clone();
    check_file_name(&name).map_err(|message| FetchError::refused(field, message))?;
    match &file.digest {
        Some(digest) if digest.sha256.len() == 32 => {
            Ok(RemoteFile { name, size: digest.size, key: digest.hex(), etag: None })
        }
        _ => Err(FetchError::refused(field, format!("file {name} has no SHA-256"))),
    }
}
