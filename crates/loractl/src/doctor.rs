//! Examination of what this machine can train on, and what it lacks.

mod remedies;
mod report;
mod text;

use std::path::PathBuf;
use std::time::Duration;

use lora_train::AllReduceMeasurement;
use lora_worker::probe::{ProbeError, ProbeReport};
use tokio::process::Command;
use tokio::task::JoinSet;

use crate::cuda::{self, Build, Candidate, ChildError, Driver, LIBRARIES, ProbeQuery};

pub(crate) use report::Report;

/// Additional time for the process that runs the all-reduce. After its own limit, this process
/// still kills the ranks that did not answer, and names them.
const MARGIN: Duration = Duration::from_secs(15);

/// Options of an examination.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Whether to examine CUDA and GPUs.
    pub(crate) cuda: bool,
    /// The worker program to examine; `None`: the installed ones.
    pub(crate) worker: Option<PathBuf>,
    /// Time limit for each child process.
    pub(crate) limit: Duration,
}

/// Examines this machine. A child process that hangs or crashes becomes part of the report.
///
/// # Errors
/// The measurement of the CPU failed.
pub(crate) async fn examine(options: &Options) -> Result<Report, ProbeError> {
    if !options.cuda {
        return Report::cpu_only();
    }
    let limit = options.limit;
    let driver: Result<Driver, ChildError> = ProbeQuery::Driver.ask(limit).await;
    let mut loading = JoinSet::new();
    for (index, library) in LIBRARIES.iter().enumerate() {
        loading.spawn(async move { (index, ProbeQuery::Library(library).ask(limit).await) });
    }
    let mut libraries = loading.join_all().await;
    libraries.sort_by_key(|(index, _)| *index);
    let libraries = libraries.into_iter().map(|(_, loaded)| loaded).collect();
    let workers = cuda::candidates(options.worker.as_deref(), limit).await;
    let gpus = driver.as_ref().map_or(0, |driver| driver.gpus.len());
    let (mut readings, mut all_reduce) = (Vec::new(), None);
    if let Some(worker) = built_for_cuda(&workers) {
        for number in 0..gpus {
            let device = format!("cuda:{number}");
            let mut command = Command::new(&worker.path);
            readings
                .push(cuda::answer::<ProbeReport>(command.args(["probe", "--device", &device]), limit).await);
        }
        if gpus > 1 {
            let mut command = Command::new(&worker.path);
            command.args(["probe", "--device", "cuda", "--all-reduce", &gpus.to_string()]);
            command.args(["--timeout", &limit.as_secs().to_string()]);
            all_reduce = Some(cuda::answer::<AllReduceMeasurement>(&mut command, limit + MARGIN).await);
        }
    }
    Report::new(driver, libraries, workers, readings, all_reduce)
}

/// The first worker program that was built for CUDA.
pub(crate) fn built_for_cuda(workers: &[Candidate]) -> Option<&Candidate> {
    workers.iter().find(|worker| matches!(worker.build, Build::Cuda { .. }))
}
