//! The engine's thread: brings the observed state in line with the desired state, and keeps the
//! base in memory between jobs.
//!
//! The thread blocks. It abandons work for a job or a group as soon as that job or group is no
//! longer desired. A run in memory outlives its group.

mod interruption;
mod prepare;
mod save;
mod task;
mod train;

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use lora_collective::backend_choice::Collective;
use lora_collective::{CancelToken, PeerListener};
use lora_model::{Base, BaseKey};
use lora_proto::v1::{self, Fault, Phase};
use lora_spec::{DeviceMemory, JobSpec};
use lora_train::{ComputeDevice, Run, TrainError, check_device};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;

use self::interruption::{GroupFailure, Interruption};
use self::task::{Task, next_task};
use crate::directive::{DesiredState, GroupLimits, WorkScope};
use crate::error::WorkerError;
use crate::fetch::{FetchedFiles, InputFetcher};
use crate::metrics::{Counters, DeviceMemoryGauges};
use crate::status::CurrentJob;
use crate::step_outbox::StepOutbox;
use crate::uploads::{CheckpointUploader, Uploads};

/// How long a GPU may take to reach a point at which the engine checks for cancellation. Until
/// then the engine may compute some micro-batches, or read a base.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(300);

/// The resources of the engine.
pub(crate) struct EngineContext {
    pub(crate) listener: PeerListener,
    pub(crate) device: ComputeDevice,
    pub(crate) collective: Collective,
    /// `None` if the device is the CPU.
    pub(crate) used: Option<DeviceMemoryGauges>,
    /// The memory that a job may use.
    pub(crate) memory: DeviceMemory,
    /// The channel to the coordinator.
    pub(crate) channel: Channel,
    pub(crate) fetcher: InputFetcher,
    /// If the channel is closed, the engine releases its job and ends.
    pub(crate) desired: watch::Receiver<DesiredState>,
    /// `None` before the first welcome, and so before the first directive.
    pub(crate) limits: watch::Receiver<Option<GroupLimits>>,
    pub(crate) status: watch::Sender<Option<CurrentJob>>,
    pub(crate) steps: StepOutbox,
    pub(crate) counters: Counters,
}

impl EngineContext {
    /// Starts the thread. Must be called in a runtime. The returned channel gets an error if the
    /// device is lost, and is closed once the thread has ended.
    pub(crate) fn start(self) -> io::Result<mpsc::Receiver<WorkerError>> {
        let (fatal_errors, ended) = mpsc::channel(1);
        let runtime = Handle::current();
        std::thread::Builder::new().name("engine".into()).spawn(move || {
            let ending = fatal_errors.clone();
            let mut thread = EngineThread {
                engine: self,
                runtime,
                fatal_errors,
                base: None,
                nccl_failure: None,
                job: None,
                checkpoints: None,
            };
            if let Err(error) = thread.serve() {
                // The receiver may be gone, or may have an error already.
                let _ = ending.try_send(WorkerError::Device(error));
            }
        })?;
        Ok(ended)
    }

    fn measure_memory(&self) {
        if let Some(used) = &self.used {
            used.measure(&self.device);
        }
    }
}

struct EngineThread {
    engine: EngineContext,
    runtime: Handle,
    /// Receives the error if the device is lost.
    fatal_errors: mpsc::Sender<WorkerError>,
    /// The base that was loaded last.
    base: Option<(BaseKey, Arc<Base>)>,
    /// The error with which NCCL failed when an earlier group formed.
    nccl_failure: Option<String>,
    /// The job whose state is in memory.
    job: Option<LoadedJob>,
    /// The upload of checkpoints. Present while this rank trains as rank 0.
    checkpoints: Option<CheckpointUploader>,
}

/// A job whose state is in memory.
struct LoadedJob {
    run: Run,
    /// Holds the locks on the cached inputs while the job is loaded.
    _files: FetchedFiles,
}

impl EngineThread {
    /// Works until the channel of the desired state is closed.
    ///
    /// # Errors
    /// The device is lost, and with it the state and the worker. The group continues without this
    /// worker, from the state of another member.
    fn serve(&mut self) -> Result<(), TrainError> {
        loop {
            let desired = self.engine.desired.borrow_and_update().clone();
            let task = next_task(self.engine.status.borrow().as_ref(), &desired);
            match task {
                Task::Wait => {
                    if self.runtime.block_on(self.engine.desired.changed()).is_err() {
                        self.release_job();
                        return Ok(());
                    }
                }
                Task::Release => self.release_job(),
                Task::Prepare(assignment) => self.work(|engine| engine.prepare(&assignment))?,
                Task::Reassign(assignment) => self.work(|engine| engine.reassign(&assignment))?,
                Task::Train(assignment) => self.work(|engine| engine.train(&assignment))?,
                Task::Save(assignment) => self.work(|engine| engine.save(&assignment))?,
            }
            self.engine.measure_memory();
        }
    }

    /// Does a piece of work. If the work does not complete, reports the reason in the status.
    ///
    /// # Errors
    /// The device is lost.
    fn work(&mut self, work: impl FnOnce(&mut Self) -> Result<(), Interruption>) -> Result<(), TrainError> {
        // After a panic, nothing of the run is used again. The base is never written to.
        let result = catch_unwind(AssertUnwindSafe(|| work(self)));
        self.end_checkpoints();
        if let Some(job) = &mut self.job {
            job.run.leave()?;
        }
        let panicked = |panic: Box<dyn Any + Send>| {
            Interruption::Failed(Fault::Engine, format!("the engine panicked: {}", panic_text(&*panic)))
        };
        match result.unwrap_or_else(|panic| Err(panicked(panic))) {
            Ok(()) => {}
            // A job that is not loaded yet has no state to keep.
            Err(Interruption::Superseded) if self.job.is_none() => self.release_job(),
            Err(Interruption::Superseded) => {}
            Err(Interruption::GroupFailure(GroupFailure { cause, suspects, unreachable })) => {
                self.check_device(&cause)?;
                let completed_steps = self.job.as_ref().map_or(0, |job| job.run.completed_steps());
                self.update(|current| {
                    tracing::warn!(
                        job = current.job_id,
                        generation = current.generation,
                        cause,
                        "group failed"
                    );
                    current.enter(Phase::Broken);
                    current.completed_steps = completed_steps;
                    (current.cause, current.suspects, current.unreachable) = (cause, suspects, unreachable);
                });
            }
            Err(Interruption::Failed(fault, cause)) => {
                self.check_device(&cause)?;
                self.job = None;
                self.update(|current| {
                    tracing::error!(
                        job = current.job_id,
                        generation = current.generation,
                        cause,
                        "job failed"
                    );
                    current.enter(Phase::Failed);
                    (current.fault, current.cause) = (fault, cause);
                });
            }
        }
        Ok(())
    }

    /// Checks whether the device is the reason for a failure with `cause`. If a GPU no longer
    /// works, the failure is not attributed to the job or the peers.
    ///
    /// # Errors
    /// The device is lost.
    fn check_device(&self, cause: &str) -> Result<(), TrainError> {
        check_device(&self.engine.device).inspect_err(|_| tracing::error!(cause, "the device is lost"))
    }

    /// Releases the job. Its memory is free before the status shows that.
    fn release_job(&mut self) {
        self.end_checkpoints();
        self.job = None;
        self.engine.steps.clear();
        if let Some(current) = self.engine.status.send_replace(None) {
            tracing::info!(job = current.job_id, "job released");
        }
    }

    fn end_checkpoints(&mut self) {
        if let Some(checkpoints) = self.checkpoints.take() {
            self.runtime.block_on(checkpoints.end());
        }
    }

    fn update(&self, change: impl FnOnce(&mut CurrentJob)) {
        self.engine.status.send_modify(|current| {
            if let Some(current) = current {
                change(current);
            }
        });
    }

    fn enter(&self, phase: Phase) {
        self.update(|current| current.enter(phase));
    }

    /// Returns a token that is cancelled when `scope` is no longer desired, as long as the handle
    /// lives. If a GPU blocks the thread long after that, the device is reported as lost, because
    /// calls to CUDA have no time limit.
    fn cancel_with(&self, scope: WorkScope) -> (CancelToken, AbortOnDropHandle<()>) {
        let cancel = CancelToken::new();
        let (token, desired) = (cancel.clone(), self.engine.desired.clone());
        let fatal_errors = Some(self.fatal_errors.clone()).filter(|_| !self.engine.device.is_cpu());
        let watching = self.runtime.spawn(async move {
            wait_until_superseded(desired, scope).await;
            token.cancel();
            if let Some(fatal_errors) = fatal_errors {
                sleep(CANCEL_TIMEOUT).await;
                // The channel may have an error already.
                let _ = fatal_errors.try_send(WorkerError::Stuck(CANCEL_TIMEOUT));
            }
        });
        (cancel, AbortOnDropHandle::new(watching))
    }

    /// Waits for `work` while `scope` is desired.
    fn wait_for<T>(
        &self,
        scope: WorkScope,
        work: impl Future<Output = Result<T, Interruption>>,
    ) -> Result<T, Interruption> {
        let desired = self.engine.desired.clone();
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = wait_until_superseded(desired, scope) => Err(Interruption::Superseded),
                result = work => result,
            }
        })
    }

    fn uploads(&self, assignment: &v1::Assignment) -> Uploads {
        Uploads {
            channel: self.engine.channel.clone(),
            job_id: assignment.job_id.clone(),
            generation: assignment.generation,
        }
    }
}

/// Returns once `scope` is no longer desired, or once the channel is closed.
async fn wait_until_superseded(mut desired: watch::Receiver<DesiredState>, scope: WorkScope) {
    // An error means that the channel is closed: the worker ends.
    let _ = desired.wait_for(|desired| !scope.is_current(desired)).await;
}

fn job_spec(assignment: &v1::Assignment) -> Result<JobSpec, Interruption> {
    let message = assignment.job.clone().unwrap_or_default();
    JobSpec::try_from(message).map_err(|error| Interruption::Failed(Fault::Job, error.to_string()))
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
