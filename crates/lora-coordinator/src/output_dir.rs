//! A job's output directory: `job.yaml`, `metrics.jsonl`, `checkpoints/`, and at the end the result.
//!
//! Whatever is uploaded lies in `.staging/` until it is whole, on disk and wanted; then it is renamed to its place. Of a
//! result `receipt.json` comes last: where it is, the result is complete. Nothing is created before a job trains.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use lora_proto::v1::StepMetrics;
use lora_spec::{FieldError, JobSpec};
use serde_json::Value;

use crate::metrics_file::MetricsFile;

/// The file whose presence marks a finished result.
pub(crate) const RECEIPT: &str = "receipt.json";
const JOB: &str = "job.yaml";
const METRICS: &str = "metrics.jsonl";
const CHECKPOINTS: &str = "checkpoints";
const STAGING: &str = ".staging";
/// Files of a model, an adapter or another trainer, which a run must not mix with or overwrite.
const FOREIGN: [&str; 6] = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
    "tokenizer.json",
    METRICS,
    CHECKPOINTS,
];

/// What is wrong with an output directory.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// A finished result lies there.
    #[error("{dir} holds a finished result; choose another output directory", dir = .0.display())]
    HoldsResult(PathBuf),
    /// An unfinished run lies there, and it was not asked to go on.
    #[error(
        "{dir} holds an unfinished run; resume it (--resume), or choose another output directory",
        dir = .0.display()
    )]
    HoldsRun(PathBuf),
    /// A file of some other origin is in the way.
    #[error("{path} is in the way; choose another output directory", path = .0.display())]
    InTheWay(PathBuf),
    /// There is nothing to go on from.
    #[error("{dir} holds no unfinished run to resume; start one without --resume", dir = .0.display())]
    NothingToResume(PathBuf),
    /// The run that lies there has other settings.
    #[error("{job} is the unfinished run's, and differs: {difference}", job = job.display())]
    OtherJob {
        /// `job.yaml` of the unfinished run.
        job: PathBuf,
        /// The first setting that differs.
        difference: FieldError,
    },
    /// `job.yaml` of the unfinished run cannot be understood.
    #[error(transparent)]
    Unreadable(#[from] lora_spec::JobFileError),
    /// Another process writes there.
    #[error("{dir} is in use by another run", dir = .0.display())]
    InUse(PathBuf),
    /// The file system refuses.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the file system says.
        source: io::Error,
    },
}

/// Whether a job may start in `dir` (with `resume`: go on there). Creates nothing.
pub fn check_output_dir(dir: &Path, resume: bool) -> Result<(), OutputError> {
    let has = |name: &str| dir.join(name).symlink_metadata().is_ok();
    if has(RECEIPT) {
        return Err(OutputError::HoldsResult(dir.to_owned()));
    }
    match (has(JOB), resume) {
        (true, true) => Ok(()),
        (true, false) => Err(OutputError::HoldsRun(dir.to_owned())),
        (false, true) => Err(OutputError::NothingToResume(dir.to_owned())),
        (false, false) => {
            if dir.symlink_metadata().is_ok() && !dir.is_dir() {
                return Err(OutputError::InTheWay(dir.to_owned()));
            }
            match FOREIGN.iter().find(|name| has(name)) {
                Some(name) => Err(OutputError::InTheWay(dir.join(name))),
                None => Ok(()),
            }
        }
    }
}

/// An output directory that this process alone writes to.
#[derive(Debug)]
pub(crate) struct OutputDir {
    path: PathBuf,
    /// Held open for its lock.
    _lock: File,
    metrics: Option<MetricsFile>,
}

impl OutputDir {
    /// Makes the directory of a new job.
    pub(crate) fn create(path: &Path, job: &JobSpec) -> Result<Self, OutputError> {
        fs::create_dir_all(path).map_err(at(path))?;
        let dir = Self { path: path.to_owned(), _lock: lock(path)?, metrics: None };
        check_output_dir(path, false)?;
        dir.create_subdirectories()?;
        let job_path = path.join(JOB);
        let text =
            serde_saphyr::to_string(job).map_err(|e| at(&job_path)(io::Error::other(e.to_string())))?;
        let staged = path.join(STAGING).join(JOB);
        write_synced(&staged, text.as_bytes()).map_err(at(&staged))?;
        fs::rename(&staged, &job_path).map_err(at(&job_path))?;
        sync_dir(path)?;
        Ok(dir)
    }

    /// Opens the directory of an unfinished run of `job`; the number of workers may be another.
    pub(crate) fn reopen(path: &Path, job: &JobSpec) -> Result<Self, OutputError> {
        check_output_dir(path, true)?;
        let dir = Self { path: path.to_owned(), _lock: lock(path)?, metrics: None };
        check_output_dir(path, true)?;
        let job_path = path.join(JOB);
        let ours = lora_spec::JobFile::read(&job_path)?.job;
        if let Some(difference) = difference(job, &ours) {
            return Err(OutputError::OtherJob { job: job_path, difference });
        }
        let staging = path.join(STAGING);
        if staging.symlink_metadata().is_ok() {
            fs::remove_dir_all(&staging).map_err(at(&staging))?;
        }
        dir.create_subdirectories()?;
        Ok(dir)
    }

    /// Prepares for rows of metrics after `completed_steps`; later ones are dropped.
    pub(crate) fn open_metrics(&mut self, completed_steps: u64) -> Result<(), OutputError> {
        let path = self.path.join(METRICS);
        self.metrics = Some(MetricsFile::open(&path, completed_steps).map_err(at(&path))?);
        Ok(())
    }

    /// Appends a row to `metrics.jsonl`.
    pub(crate) fn append_metrics(&mut self, metrics: &StepMetrics) -> Result<(), OutputError> {
        let path = self.path.join(METRICS);
        self.metrics.as_mut().map_or(Ok(()), |file| file.append(metrics)).map_err(at(&path))
    }

    /// Where an upload is written to before it is committed. `name` has no directories.
    pub(crate) fn staging_path(&self, generation: u64, name: &str) -> PathBuf {
        self.path.join(STAGING).join(format!("{generation}-{name}"))
    }

    /// The step of the newest checkpoint.
    pub(crate) fn newest_checkpoint(&self) -> Result<Option<u64>, OutputError> {
        Ok(self.checkpoints()?.last_key_value().map(|(step, _)| *step))
    }

    /// Moves the staged checkpoint of `step` to its place and removes all but the `keep` newest.
    pub(crate) fn commit_checkpoint(
        &self,
        staged: &Path,
        step: u64,
        keep: usize,
    ) -> Result<PathBuf, OutputError> {
        let path = checkpoint_path(&self.path, step);
        fs::rename(staged, &path).map_err(at(&path))?;
        sync_dir(&self.path.join(CHECKPOINTS))?;
        let checkpoints = self.checkpoints()?;
        let surplus = checkpoints.len().saturating_sub(keep.max(1));
        for old in checkpoints.values().take(surplus) {
            fs::remove_file(old).map_err(at(old))?;
        }
        Ok(path)
    }

    /// Moves the staged result files, by name, to their places; the receipt last.
    pub(crate) fn commit_result(&self, files: &BTreeMap<String, PathBuf>) -> Result<(), OutputError> {
        let receipt = files.get_key_value(RECEIPT);
        let others = files.iter().filter(|(name, _)| *name != RECEIPT);
        for (name, staged) in others.chain(receipt) {
            if name == RECEIPT {
                sync_dir(&self.path)?;
            }
            let path = self.path.join(name);
            fs::rename(staged, &path).map_err(at(&path))?;
        }
        sync_dir(&self.path)?;
        let staging = self.path.join(STAGING);
        fs::remove_dir_all(&staging).map_err(at(&staging))
    }

    fn create_subdirectories(&self) -> Result<(), OutputError> {
        for name in [CHECKPOINTS, STAGING] {
            let path = self.path.join(name);
            fs::create_dir_all(&path).map_err(at(&path))?;
        }
        Ok(())
    }

    /// Complete checkpoints by step; files of other names are not ours.
    fn checkpoints(&self) -> Result<BTreeMap<u64, PathBuf>, OutputError> {
        let dir = self.path.join(CHECKPOINTS);
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let path = entry.map_err(at(&dir))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let digits = name.strip_prefix("step-").and_then(|n| n.strip_suffix(".safetensors"));
            if let Some(step) = digits.and_then(|d| d.parse().ok()) {
                found.insert(step, path);
            }
        }
        Ok(found)
    }
}

/// Where the checkpoint of `step` lies in the output directory `dir`.
pub(crate) fn checkpoint_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(CHECKPOINTS).join(checkpoint_name(step))
}

/// The file name of the checkpoint of `step`.
pub(crate) fn checkpoint_name(step: u64) -> String {
    format!("step-{step:08}.safetensors")
}

/// The first setting of `job` that is another in `ours`. The number of workers changes no result.
fn difference(job: &JobSpec, ours: &JobSpec) -> Option<FieldError> {
    let json = |job: &JobSpec| serde_json::to_value(job).unwrap_or_default();
    let (job, ours) = (json(job), json(ours));
    lora_spec::known_keys()
        .into_iter()
        .filter(|(key, section)| !section && !key.starts_with("workers."))
        .find_map(|(key, _)| {
            let pointer = format!("/{}", key.replace('.', "/"));
            let value = |job: &Value| job.pointer(&pointer).cloned().unwrap_or_default();
            let (given, kept) = (value(&job), value(&ours));
            let message = format!("is {given}, and was {kept}");
            (given != kept).then(|| FieldError::new(&key, message))
        })
}

fn lock(dir: &Path) -> Result<File, OutputError> {
    let file = File::open(dir).map_err(at(dir))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OutputError::InUse(dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(at(dir)(source)),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A rename is on disk once its directory is.
fn sync_dir(dir: &Path) -> Result<(), OutputError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
}

fn at(path: &Path) -> impl Fn(io::Error) -> OutputError {
    let path = path.to_owned();
    move |source| OutputError::Io { path: path.clone(), source }
}

#[cfg(test)]
mod tests;
