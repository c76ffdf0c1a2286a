//! One job from submit to end.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use lora_coordinator::Coordinator;
use lora_proto::MAX_MESSAGE_BYTES;
use lora_proto::v1;
use lora_proto::v1::fine_tuning_client::FineTuningClient;
use lora_spec::JobSpec;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{sleep_until, timeout};
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use super::progress::Progress;
use super::summary::{RunSummary, Tally};
use super::workers::{WorkerExit, Workers};
use crate::job;

/// How long worker processes may take to connect.
const CONNECTING: Duration = Duration::from_secs(60);
/// How long the job's failure may take to be known once a worker has died.
const VERDICT: Duration = Duration::from_secs(10);
/// How long workers may take to end, and then the coordinator.
const FAREWELL: Duration = Duration::from_secs(4);
/// How long a call to the embedded coordinator may take.
const CALL: Duration = Duration::from_secs(10);

/// What to run, and where.
#[derive(Debug, Clone)]
pub(crate) struct RunOptions {
    /// The job file.
    pub(crate) job: PathBuf,
    pub(crate) workers: usize,
    pub(crate) output_dir: PathBuf,
    /// Threads that a worker computes with; none: the machine's cores, shared out.
    pub(crate) threads: Option<usize>,
    /// Go on from the unfinished run in `output_dir`.
    pub(crate) resume: bool,
}

/// Runs a job on worker processes of this machine and shows its progress on stderr. Blocks until it is over.
///
/// Ctrl-C and SIGTERM pause the job with a checkpoint; a second one stops at once.
///
/// # Errors
/// What is wrong with the job, its files or the output directory, before anything is started or created; processes that
/// cannot be started or reached. A job that failed is no error here but a summary that says so.
pub(crate) fn run_job(options: &RunOptions) -> anyhow::Result<RunSummary> {
    let started = Instant::now();
    let job = job::load(&options.job, options.workers)?;
    let output_dir = std::path::absolute(&options.output_dir)
        .with_context(|| format!("{} is no path", options.output_dir.display()))?;
    lora_coordinator::check_output_dir(&output_dir, options.resume)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let tally = runtime.block_on(run(options, &job, &output_dir))?;
    Ok(tally.summary(options.workers, output_dir, started.elapsed()))
}

async fn run(options: &RunOptions, job: &JobSpec, output_dir: &Path) -> anyhow::Result<Tally> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = options.threads.unwrap_or((cores / options.workers).max(1));
    let mut signals = Signals::listen()?;
    let coordinator = Coordinator::bind(&lora_coordinator::Options::default()).await?;
    let handle = coordinator.handle();
    let address = format!("http://{}", handle.address());
    let serving = tokio::spawn(coordinator.serve());
    let mut progress = Progress::new();
    let mut workers = Workers::start(options.workers, threads, &address, progress.bar())?;
    let mut client = connect(&address).await?;
    let request = v1::SubmitJobRequest {
        job: Some(v1::JobSpec::try_from(job)?),
        output_dir: output_dir.to_str().context("the output directory's path is not UTF-8")?.to_owned(),
        resume: options.resume,
    };
    let submitted = timeout(CALL, client.submit_job(request)).await.context("submitting the job")?;
    let job_id = submitted.map_err(|status| anyhow!("{}", status.message()))?.into_inner().job_id;
    let watching = client.watch_job(v1::WatchJobRequest { job_id: job_id.clone(), from_number: 1 });
    let events = timeout(CALL, watching).await.context("watching the job")??.into_inner();
    let run = Following { client, job_id, events, tally: Tally::default(), pausing: false };
    let ended = run.follow(&mut workers, &mut signals, &mut progress).await;
    progress.finish();
    drop(signals);
    // Where the job goes on, nothing of it is waited for.
    let patience = match &ended {
        Ok(tally) if tally.is_at_rest() => FAREWELL,
        _ => Duration::ZERO,
    };
    handle.shutdown();
    workers.finish(patience).await;
    timeout(FAREWELL, serving).await.context("the coordinator did not end")???;
    ended
}

async fn connect(address: &str) -> anyhow::Result<FineTuningClient<Channel>> {
    let endpoint = Endpoint::from_shared(address.to_owned())?.connect_timeout(CALL);
    let channel = endpoint.connect().await.context("cannot reach the embedded coordinator")?;
    Ok(FineTuningClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// Ctrl-C and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let on = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self { interrupt: on(SignalKind::interrupt())?, terminate: on(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// A submitted job that is being followed.
struct Following {
    client: FineTuningClient<Channel>,
    job_id: String,
    events: Streaming<v1::JobEvent>,
    tally: Tally,
    pausing: bool,
}

impl Following {
    /// Until the job is over or paused, or a second signal stops it.
    async fn follow(
        mut self,
        workers: &mut Workers,
        signals: &mut Signals,
        progress: &mut Progress,
    ) -> anyhow::Result<Tally> {
        let connected_by = tokio::time::Instant::now() + CONNECTING;
        loop {
            tokio::select! {
                event = self.events.message() => match event? {
                    Some(event) => {
                        self.tally.take(&event);
                        progress.show(&event, &self.tally);
                    }
                    None => return Ok(self.tally),
                },
                Some(exit) = workers.next_exit() => {
                    let exit = exit?;
                    if !self.tally.assigned() {
                        bail!("{exit}");
                    }
                    self.await_verdict(&exit, progress).await?;
                    return Ok(self.tally);
                }
                () = signals.next() => {
                    if self.pausing {
                        progress.say("stopped at once; what came after the last checkpoint is lost");
                        return Ok(self.tally);
                    }
                    self.pausing = true;
                    self.pause(progress).await?;
                }
                () = sleep_until(connected_by), if !self.tally.assigned() => {
                    bail!("the workers did not connect within {CONNECTING:?}");
                }
            }
        }
    }

    /// A worker died: the coordinator will see it and fail the job.
    async fn await_verdict(&mut self, exit: &WorkerExit, progress: &mut Progress) -> anyhow::Result<()> {
        progress.say(&exit.to_string());
        let rest = async {
            while let Some(event) = self.events.message().await? {
                self.tally.take(&event);
                progress.show(&event, &self.tally);
            }
            anyhow::Ok(())
        };
        timeout(VERDICT, rest).await.with_context(|| exit.to_string())?
    }

    async fn pause(&mut self, progress: &Progress) -> anyhow::Result<()> {
        progress.say("pausing after this step; a second signal stops at once");
        let request = v1::PauseJobRequest { job_id: self.job_id.clone() };
        match timeout(CALL, self.client.pause_job(request)).await.context("pausing the job")? {
            Ok(_) => Ok(()),
            // It has just ended by itself.
            Err(status) if status.code() == tonic::Code::FailedPrecondition => Ok(()),
            Err(status) => Err(anyhow!("{}", status.message())),
        }
    }
}
