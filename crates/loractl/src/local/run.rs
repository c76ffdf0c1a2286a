//! The run of one job on this machine, from its start to its end.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use lora_collective::backend_choice::Collective;
use lora_coordinator::{Coordinator, CoordinatorError, Handle};
use lora_proto::v1::{self, job_event};
use lora_spec::{DeviceKind, DeviceMemory, JobFile, JobState};
use lora_worker::machine_memory;
use prost_types::Timestamp;
use tokio::task::JoinHandle;
use tokio::time::{sleep_until, timeout};

use super::fleet::{DeviceChoice, Fleet};
use super::output_dir::{self, OutputDir, OutputError, RUN_FILES, RunMetrics};
use super::signals::SignalStream;
use super::submission;
use super::summary::RunSummary;
use super::workers::{WorkerExit, WorkerOptions, WorkerProcesses};
use crate::client::Client;
use crate::download::download_result;
use crate::job_check;
use crate::job_upload::{BaseLocation, JobUpload};
use crate::job_watch::{JobWatch, WatchItem, WatchStart};
use crate::progress::{EventTimes, ProgressDisplay};
use crate::stats::JobStats;

/// How long to wait for the embedded coordinator if it is unreachable.
const WAIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for the workers to exit.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for the coordinator to end after that.
const COORDINATOR_LIMIT: Duration = lora_coordinator::SHUTDOWN_LIMIT.saturating_add(Duration::from_secs(1));
/// Maximum number of restarts of a worker without a finished step between them.
const MAX_RESTARTS: usize = 3;
/// Heartbeat interval and lease of workers on the same machine, in seconds.
const HEARTBEAT_SECONDS: f64 = 0.5;
const LEASE_SECONDS: f64 = 5.0;

/// Options of a run.
#[derive(Debug, Clone)]
pub(crate) struct RunOptions {
    /// The job file.
    pub(crate) job: PathBuf,
    /// Number of workers; `None`: one on the CPU, or one for each GPU.
    pub(crate) workers: Option<usize>,
    pub(crate) device: DeviceChoice,
    /// Transport of gradients between GPUs.
    pub(crate) collective: Collective,
    /// Path of the `lora-worker` for GPUs; `None`: the installed one.
    pub(crate) worker: Option<PathBuf>,
    pub(crate) output_dir: PathBuf,
    /// Compute threads of each worker; `None`: the machine's cores divided by the workers.
    pub(crate) threads: Option<usize>,
    /// Whether to continue the unfinished run in `output_dir`.
    pub(crate) resume: bool,
}

/// Runs a job on worker processes of this machine and shows its progress on stderr. Blocks until
/// the run has ended.
///
/// Ctrl-C and SIGTERM pause the job with a checkpoint; a second signal stops the run immediately.
///
/// # Errors
/// The job, its files or the output directory are invalid (before anything is started or created),
/// or processes cannot be started or reached, or die repeatedly. A failed job is not an error: the
/// summary has the failure.
pub(crate) fn run_job(options: &RunOptions) -> Result<RunSummary> {
    let started = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let fleet = runtime.block_on(Fleet::choose(options.device, options.worker.as_deref()))?;
    let (file, plan, workers) = match options.workers {
        Some(workers) => {
            let (file, plan) = job_check::load(&options.job, workers)?;
            (file, plan, workers)
        }
        None => job_check::load_with_max_workers(&options.job, fleet.size())?,
    };
    // The memory of a GPU is not known before the worker opens the GPU.
    let memory = match &fleet {
        Fleet::Cpu => machine_memory().map(|bytes| bytes / workers.max(1) as u64),
        Fleet::Cuda(_) => None,
    };
    plan.requirements.fits(DeviceMemory::new(DeviceKind::Cpu, memory))?;
    job_check::show_notes(&plan);
    let path = std::path::absolute(&options.output_dir)
        .with_context(|| format!("{:?} is not a path", options.output_dir))?;
    output_dir::check(&path, options.resume)?;
    let base = BaseLocation::Path(file.job.model.base.clone());
    let inputs = JobUpload::collect(&file, base, plan.token_files(), &ProgressBar::hidden())?;
    let output = OutputDir::open(&path, options.resume)?;
    let device = fleet.name();
    let mut run = LocalRun {
        threads: options.threads,
        memory,
        collective: options.collective,
        fleet,
        workers,
        file,
        inputs,
        output,
        holds_store: false,
        progress: ProgressDisplay::new(EventTimes::Hidden),
        stats: JobStats::default(),
    };
    let ended = runtime.block_on(run.with_coordinator());
    run.progress.finish();
    run.clean_up(ended.is_ok())?;
    ended?;
    Ok(RunSummary::new(&run.stats, workers, device, path, started.elapsed()))
}

struct LocalRun {
    threads: Option<usize>,
    /// Bytes of memory that each worker may use; `None`: the worker detects its memory.
    memory: Option<u64>,
    collective: Collective,
    fleet: Fleet,
    workers: usize,
    file: JobFile,
    inputs: JobUpload,
    output: OutputDir,
    /// Whether this run has locked the store, so that no other process writes to the directory.
    holds_store: bool,
    progress: ProgressDisplay,
    stats: JobStats,
}

impl LocalRun {
    /// Starts the embedded coordinator, runs the job, and stops the coordinator.
    async fn with_coordinator(&mut self) -> Result<()> {
        let (handle, mut serving) = self.start_coordinator().await?;
        let ended = tokio::select! {
            ended = self.with_workers(&handle) => ended,
            served = &mut serving => {
                served??;
                bail!("the embedded coordinator ended unexpectedly");
            }
        };
        handle.shutdown();
        let stopped = timeout(COORDINATOR_LIMIT, &mut serving).await;
        ended?;
        match stopped {
            Ok(served) => served??,
            // The job has ended, and what was committed is on the disk: the user loses nothing.
            Err(_) => serving.abort(),
        }
        Ok(())
    }

    async fn start_coordinator(&mut self) -> Result<(Handle, JoinHandle<Result<(), CoordinatorError>>)> {
        let mut config =
            lora_coordinator::Config { state_dir: self.output.state_dir(), ..Default::default() };
        config.grpc.listen = "127.0.0.1:0".into();
        config.http.listen = String::new();
        config.limits.upload_bytes = u64::MAX;
        config.workers.heartbeat_seconds = HEARTBEAT_SECONDS;
        config.workers.lease_seconds = LEASE_SECONDS;
        let bound = Coordinator::bind(&config).await;
        let coordinator = bound.map_err(|error| match error {
            CoordinatorError::InUse(_) => OutputError::InUse(self.output.path().to_owned()).into(),
            CoordinatorError::NotOwner(_) => OutputError::MixedStore(self.output.path().to_owned()).into(),
            other => anyhow::Error::from(other),
        })?;
        self.holds_store = true;
        let handle = coordinator.handle();
        Ok((handle, tokio::spawn(coordinator.serve())))
    }

    /// Submits or resumes the job, starts the workers, follows the job until it stops, and
    /// downloads the result.
    async fn with_workers(&mut self, handle: &Handle) -> Result<()> {
        let mut signals = SignalStream::listen()?;
        let address = format!("http://{}", handle.address());
        let client = Client::connect(&address).await?;
        let (start, job) = if self.output.is_resumed() {
            let start = SystemTime::now();
            (start, submission::resume(&client, &self.file, &self.inputs, &self.progress).await?)
        } else {
            (UNIX_EPOCH, submission::submit_new(&client, &self.file, &self.inputs).await?)
        };
        self.output.write_job(&self.file.job)?;
        self.stats = JobStats::from_job(&job);
        if self.stats.state() == Some(JobState::Succeeded) {
            return self.take_result(&client, &job).await;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = self.workers;
        let worker_options = WorkerOptions {
            coordinator: address,
            count,
            threads: self.threads.unwrap_or((cores / count).max(1)),
            memory: self.memory,
            cache_dir: self.output.cache_dir(),
            fleet: self.fleet.clone(),
            collective: self.collective,
        };
        let mut workers = WorkerProcesses::new(worker_options, self.progress.bar());
        for index in 0..count {
            workers.start(index)?;
        }
        let metrics = self.output.metrics()?;
        let from = WatchStart { event: 1, after_step: Some(metrics.last_step()) };
        let follower = RunFollower {
            watch: JobWatch::start(&client, &job, from, WAIT_TIMEOUT),
            client: &client,
            job_id: &job.job_id,
            started: start.into(),
            metrics,
            connect_limit: self.fleet.connect_limit(),
            workers: &mut workers,
            restarts: vec![0; count],
            assigned: false,
            pausing: false,
        };
        let has_stopped = follower.follow(&mut self.stats, &mut self.progress, &mut signals).await?;
        if self.stats.state() == Some(JobState::Succeeded) {
            let job = client.job(&job.job_id).await?;
            self.take_result(&client, &job).await?;
        }
        if has_stopped {
            workers.finish(SHUTDOWN_TIMEOUT).await;
        }
        Ok(())
    }

    async fn take_result(&self, client: &Client, job: &v1::Job) -> Result<()> {
        download_result(client, job, self.output.path(), &RUN_FILES).await
    }

    /// Removes the files of a new run that failed before its first step, and the state of a run
    /// with a result. The state of a run that can continue is kept.
    fn clean_up(&self, ended_well: bool) -> Result<(), OutputError> {
        if !self.holds_store {
            return Ok(());
        }
        let untrained = self.stats.completed_steps() == 0 && !self.output.is_resumed();
        match self.stats.state() {
            Some(JobState::Succeeded) if ended_well => self.output.finish(),
            Some(JobState::Failed) if untrained => self.output.discard(),
            _ if untrained && !ended_well => self.output.discard(),
            Some(_) if !ended_well => {
                self.progress.say("the trained state is kept; continue with the same command and --resume");
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Follows a job until it stops.
struct RunFollower<'a> {
    client: &'a Client,
    job_id: &'a str,
    watch: JobWatch,
    /// Start of this run; events before it belong to an earlier run.
    started: Timestamp,
    metrics: RunMetrics,
    /// Time limit for the workers to connect.
    connect_limit: Duration,
    workers: &'a mut WorkerProcesses,
    /// Number of restarts of each worker since the last finished step.
    restarts: Vec<usize>,
    /// Whether the job was assigned to the workers in this run.
    assigned: bool,
    pausing: bool,
}

impl RunFollower<'_> {
    /// Follows the job. Returns true when the job has stopped, and false after a second signal.
    async fn follow(
        mut self,
        stats: &mut JobStats,
        progress: &mut ProgressDisplay,
        signals: &mut SignalStream,
    ) -> Result<bool> {
        let limit = self.connect_limit;
        let mut connected_by = tokio::time::Instant::now() + limit;
        loop {
            let waits = matches!(stats.state(), Some(JobState::Queued | JobState::Waiting));
            tokio::select! {
                item = self.watch.next() => {
                    let Some(item) = item? else { return Ok(true) };
                    if self.take(&item)? {
                        stats.update(&item);
                        progress.show(&item, stats);
                    }
                    if !waits {
                        connected_by = tokio::time::Instant::now() + limit;
                    }
                }
                Some(exit) = self.workers.next_exit() => self.restart(exit?, progress)?,
                () = signals.next() => {
                    if self.pausing {
                        progress.say("stopped immediately; the steps after the last checkpoint are lost");
                        return Ok(false);
                    }
                    self.pausing = true;
                    progress.say("pausing after this step; a second signal stops immediately");
                    submission::pause(self.client, self.job_id).await?;
                }
                () = sleep_until(connected_by), if waits => {
                    let waiting_for = self.client.job(self.job_id).await?.waiting_for;
                    bail!("the job did not proceed within {limit:?}: {waiting_for}");
                }
            }
        }
    }

    /// Writes the metrics of a step, and returns whether the item belongs to this run.
    fn take(&mut self, item: &WatchItem) -> Result<bool> {
        match item {
            WatchItem::Event(event) => {
                let ours = event.time.is_none_or(|time| {
                    (time.seconds, time.nanos) >= (self.started.seconds, self.started.nanos)
                });
                self.assigned |= ours && matches!(event.kind, Some(job_event::Kind::Assigned(_)));
                Ok(ours)
            }
            WatchItem::Step(step) => {
                self.restarts.fill(0);
                if let Some(metrics) = step.metrics.as_ref().filter(|_| step.logged) {
                    self.metrics.append(metrics)?;
                }
                Ok(true)
            }
            WatchItem::Note(_) => Ok(true),
        }
    }

    /// Starts a worker that died again. It continues from the state of the other workers or from
    /// the newest checkpoint.
    fn restart(&mut self, exit: WorkerExit, progress: &ProgressDisplay) -> Result<()> {
        if !self.assigned {
            bail!("{exit}");
        }
        let restarts = &mut self.restarts[exit.index];
        *restarts += 1;
        if *restarts > MAX_RESTARTS {
            bail!("after {MAX_RESTARTS} restarts without a finished step between, {exit}");
        }
        progress.say(&format!("{exit}\nstarting it again"));
        self.workers.start(exit.index)
    }
}
