//! What this machine can train on, and what it lacks.

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

/// How much longer than its own limit the process that runs the all-reduce may take: it names the ranks
/// that gave no answer, and ends them.
const MARGIN: Duration = Duration::from_secs(15);

/// What to examine, and how.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Whether GPUs are looked for.
    pub(crate) cuda: bool,
    /// The worker to examine; none: the installed ones.
    pub(crate) worker: Option<PathBuf>,
    /// How long each process that is asked something may take.
    pub(crate) limit: Duration,
}

/// Examines this machine. What hangs or crashes on the way is part of the report.
///
/// # Errors
/// Even the CPU computes nothing.
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

/// The worker for GPUs that comes first.
pub(crate) fn built_for_cuda(workers: &[Candidate]) -> Option<&Candidate> {
    workers.iter().find(|worker| matches!(worker.build, Build::Cuda { .. }))
}
