//! The output directory of a run on this machine.
//!
//! While the job trains, the directory has `.run/` (the embedded coordinator's store, and the files
//! that workers fetched from it), `job.yaml` and `metrics.jsonl`. At the end the result is written,
//! with `receipt.json` last, and then `.run/` is removed.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use lora_proto::v1::StepMetrics;
use lora_spec::{JobSpec, file_names};

use super::metrics_file::MetricsFile;

const STATE_DIR: &str = ".run";
const CACHE_DIR: &str = "cache";
/// Locked by the coordinator that uses the store.
const LOCK_FILE: &str = "lock";
/// Files that a run writes before there is a result; the files of the result replace them.
pub(crate) const RUN_FILES: [&str; 2] = [file_names::JOB, file_names::METRICS];
/// Files of a model, an adapter or another trainer, which a run must not mix with or overwrite.
const FOREIGN_FILES: [&str; 7] = [
    file_names::ADAPTER_WEIGHTS,
    file_names::ADAPTER_CONFIG,
    file_names::MODEL_CONFIG,
    file_names::TOKENIZER,
    "checkpoints",
    file_names::JOB,
    file_names::METRICS,
];

/// What is wrong with an output directory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutputError {
    /// The directory has a finished result.
    #[error("{dir} holds a finished result; choose another output directory", dir = .0.display())]
    HoldsResult(PathBuf),
    /// The directory has an unfinished run, and `--resume` is missing.
    #[error(
        "{dir} holds an unfinished run; resume it (--resume), or choose another output directory",
        dir = .0.display()
    )]
    HoldsRun(PathBuf),
    /// A file exists that the run did not write.
    #[error("{path} already exists; choose another output directory", path = .0.display())]
    InTheWay(PathBuf),
    /// There is no unfinished run to resume.
    #[error(
        "{dir} holds no unfinished run to resume; start one without --resume",
        dir = .0.display()
    )]
    NothingToResume(PathBuf),
    /// Another process uses the directory.
    #[error("{dir} is in use by another run", dir = .0.display())]
    InUse(PathBuf),
    /// The run's database and its files do not belong together.
    #[error(
        "{dir} cannot be resumed: the database in .run does not belong to the files there; restore \
         .run as a whole, or choose another output directory",
        dir = .0.display()
    )]
    MixedStore(PathBuf),
    /// An operation of the file system failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
}

/// Checks that a job may start in `dir`, or with `resume` continue there. Creates nothing.
///
/// # Errors
/// The reason why the job may not start or continue there.
pub(crate) fn check(dir: &Path, resume: bool) -> Result<(), OutputError> {
    let has = |name: &str| dir.join(name).symlink_metadata().is_ok();
    if has(file_names::RECEIPT) {
        return Err(OutputError::HoldsResult(dir.to_owned()));
    }
    match (has(STATE_DIR), resume) {
        (true, _) if is_in_use(dir) => Err(OutputError::InUse(dir.to_owned())),
        (true, true) => Ok(()),
        (true, false) => Err(OutputError::HoldsRun(dir.to_owned())),
        (false, true) => Err(OutputError::NothingToResume(dir.to_owned())),
        (false, false) => {
            if dir.symlink_metadata().is_ok() && !dir.is_dir() {
                return Err(OutputError::InTheWay(dir.to_owned()));
            }
            match FOREIGN_FILES.iter().find(|name| has(name)) {
                Some(name) => Err(OutputError::InTheWay(dir.join(name))),
                None => Ok(()),
            }
        }
    }
}

/// Whether another run uses `dir`. The lock that decides this is taken when the store is opened;
/// this check gives a clear error before.
fn is_in_use(dir: &Path) -> bool {
    let lock = File::open(dir.join(STATE_DIR).join(LOCK_FILE));
    lock.is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

/// The output directory of a run.
#[derive(Debug)]
pub(crate) struct OutputDir {
    path: PathBuf,
    /// Whether this run created the directory.
    is_new: bool,
    resumed: bool,
}

impl OutputDir {
    /// Creates the directory, or opens an existing one, after [`check`].
    pub(crate) fn open(path: &Path, resume: bool) -> Result<Self, OutputError> {
        check(path, resume)?;
        let is_new = !path.is_dir();
        fs::create_dir_all(path).map_err(at(path))?;
        Ok(Self { path: path.to_owned(), is_new, resumed: resume })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this run continues an earlier one.
    pub(crate) fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Directory of the embedded coordinator's store.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.path.join(STATE_DIR)
    }

    /// Directory for files that the workers fetch.
    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.state_dir().join(CACHE_DIR)
    }

    /// Writes the resolved job as a job file, which can be run again without changes.
    pub(crate) fn write_job(&self, job: &JobSpec) -> Result<(), OutputError> {
        let path = self.path.join(file_names::JOB);
        let text = serde_saphyr::to_string(job).map_err(|e| at(&path)(io::Error::other(e.to_string())))?;
        let staged = self.state_dir().join(file_names::JOB);
        let mut file = File::create(&staged).map_err(at(&staged))?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(at(&staged))?;
        fs::rename(&staged, &path).map_err(at(&path))
    }

    /// Opens `metrics.jsonl` with its rows so far, to append to it.
    pub(crate) fn metrics(&self) -> Result<RunMetrics, OutputError> {
        let path = self.path.join(file_names::METRICS);
        let file = MetricsFile::open(&path).map_err(at(&path))?;
        Ok(RunMetrics { path, file })
    }

    /// Removes the state of the run, once the result is complete.
    pub(crate) fn finish(&self) -> Result<(), OutputError> {
        let state = self.state_dir();
        fs::remove_dir_all(&state).map_err(at(&state))
    }

    /// Removes everything that a new run has written, after it failed without training.
    pub(crate) fn discard(&self) -> Result<(), OutputError> {
        let state = self.state_dir();
        if state.is_dir() {
            fs::remove_dir_all(&state).map_err(at(&state))?;
        }
        for path in RUN_FILES.map(|name| self.path.join(name)) {
            if path.is_file() {
                fs::remove_file(&path).map_err(at(&path))?;
            }
        }
        if self.is_new {
            fs::remove_dir(&self.path).map_err(at(&self.path))?;
        }
        Ok(())
    }
}

/// `metrics.jsonl` of a running job.
#[derive(Debug)]
pub(crate) struct RunMetrics {
    path: PathBuf,
    file: MetricsFile,
}

impl RunMetrics {
    /// The step of the last row; 0 if there is none.
    pub(crate) fn last_step(&self) -> u64 {
        self.file.last_step()
    }

    /// Appends a row.
    pub(crate) fn append(&mut self, metrics: &StepMetrics) -> Result<(), OutputError> {
        self.file.append(metrics).map_err(at(&self.path))
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> OutputError {
    let path = path.to_owned();
    move |source| OutputError::Io { path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> JobSpec {
        let mut job = JobSpec { name: "dates".into(), ..JobSpec::default() };
        job.model.base = "/base".into();
        job.data.train = "/train.jsonl".into();
        job
    }

    /// The output directory of a run that has begun.
    fn begun(path: &Path) -> OutputDir {
        let dir = OutputDir::open(path, false).unwrap();
        fs::create_dir(dir.state_dir()).unwrap();
        dir.write_job(&job()).unwrap();
        dir.metrics().unwrap().append(&StepMetrics { step: 1, ..StepMetrics::default() }).unwrap();
        dir
    }

    #[test]
    fn the_written_job_round_trips() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("new/out");
        let dir = begun(&path);
        let mut job = job();
        job.adapter.target_modules = lora_spec::TargetModules::Names(vec!["q_proj".into()]);
        job.training.early_stopping_threshold = 1e-9;
        dir.write_job(&job).unwrap();
        assert_eq!(lora_spec::JobFile::read(&path.join(file_names::JOB)).unwrap().job, job);
    }

    #[test]
    fn a_result_marks_the_directory_as_finished() {
        let temp = tempfile::tempdir().unwrap();
        let dir = begun(temp.path());
        fs::write(temp.path().join(file_names::RECEIPT), "{}").unwrap();
        dir.finish().unwrap();
        for resume in [false, true] {
            assert!(matches!(check(temp.path(), resume), Err(OutputError::HoldsResult(_))));
        }
        assert!(!temp.path().join(STATE_DIR).exists() && temp.path().join(file_names::METRICS).exists());
    }

    #[test]
    fn an_unfinished_run_requires_resume() {
        let temp = tempfile::tempdir().unwrap();
        assert!(matches!(check(temp.path(), true), Err(OutputError::NothingToResume(_))));
        begun(temp.path());
        assert!(matches!(check(temp.path(), false), Err(OutputError::HoldsRun(_))));
        assert!(matches!(OutputDir::open(temp.path(), false), Err(OutputError::HoldsRun(_))));
        let dir = OutputDir::open(temp.path(), true).unwrap();
        assert!(dir.is_resumed() && dir.metrics().unwrap().last_step() == 1);
    }

    #[test]
    fn a_run_in_progress_is_an_error() {
        let temp = tempfile::tempdir().unwrap();
        let dir = begun(temp.path());
        let lock = File::create(dir.state_dir().join(LOCK_FILE)).unwrap();
        lock.lock().unwrap();
        for resume in [false, true] {
            assert!(matches!(check(temp.path(), resume), Err(OutputError::InUse(_))));
        }
        drop(lock);
        check(temp.path(), true).unwrap();
    }

    #[test]
    fn files_of_other_programs_are_not_overwritten() {
        for name in FOREIGN_FILES {
            let temp = tempfile::tempdir().unwrap();
            fs::write(temp.path().join(name), "theirs").unwrap();
            assert!(matches!(check(temp.path(), false), Err(OutputError::InTheWay(_))), "{name}");
            assert!(matches!(check(&temp.path().join(name), false), Err(OutputError::InTheWay(_))), "{name}");
        }
    }

    #[test]
    fn a_failed_new_run_removes_only_its_own_files() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("out");
        begun(&path).discard().unwrap();
        assert!(!path.exists());
        fs::create_dir(&path).unwrap();
        fs::write(path.join("notes.txt"), "theirs").unwrap();
        begun(&path).discard().unwrap();
        let left: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["notes.txt"]);
    }
}
