//! The engine's thread: one assignment after another, and the base that stays in memory between them.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lora_collective::{Group, GroupSpec, PeerListener};
use lora_model::{Base, BaseKey};
use lora_proto::v1::{self, artifact_name, job_report};
use lora_spec::{JobSpec, JobState};
use lora_train::{Run, RunFacts, StepMetrics, StepOutcome, TrainError};
use tokio::sync::{mpsc, oneshot};

/// How long forming the group may take, and how long ranks wait for one that makes no progress. A rank that computes is
/// waited for, so this is far above the time of a step; a lost connection is noticed at once.
const PEERS: Duration = Duration::from_secs(3600);

/// The way to the engine's thread, which ends when this is dropped.
pub(crate) struct Engine {
    pub(crate) tasks: mpsc::Sender<Task>,
    /// Answered when the thread has ended.
    pub(crate) ended: oneshot::Receiver<()>,
}

/// An assignment for the engine.
pub(crate) struct Task {
    pub(crate) assignment: v1::Assignment,
    pub(crate) job: JobSpec,
    /// The checkpoint to go on from.
    pub(crate) checkpoint: Option<Vec<u8>>,
    /// Closed: as `Drop`.
    pub(crate) commands: mpsc::Receiver<Command>,
    /// Closed by the engine once the job's memory is free.
    pub(crate) events: mpsc::Sender<Event>,
}

/// What the coordinator wants of a running assignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Start,
    Pause,
    Drop,
}

/// What the engine has to say; in this order it goes to the coordinator.
pub(crate) enum Event {
    Report(job_report::Kind),
    Upload { name: artifact_name::Name, bytes: Vec<u8> },
}

impl Engine {
    /// Starts the thread. It owns `listener`, and the cached base.
    pub(crate) fn start(listener: PeerListener) -> io::Result<Self> {
        let (tasks, mut receiver) = mpsc::channel::<Task>(1);
        let (ending, ended) = oneshot::channel();
        std::thread::Builder::new().name("engine".into()).spawn(move || {
            let mut state = EngineThread { listener, cached: None };
            while let Some(mut task) = receiver.blocking_recv() {
                state.work(&mut task);
            }
            // Nobody may wait for it any more.
            let _ = ending.send(());
        })?;
        Ok(Self { tasks, ended })
    }
}

struct EngineThread {
    listener: PeerListener,
    cached: Option<(BaseKey, Arc<Base>)>,
}

/// Why an assignment ends before its run does.
enum Stop {
    /// The coordinator takes it back, or is gone.
    Dropped,
    Failed(Box<TrainError>),
}

impl<E: Into<TrainError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(Box::new(error.into()))
    }
}

impl EngineThread {
    /// Carries an assignment out, then waits until it is taken back.
    fn work(&mut self, task: &mut Task) {
        let mut completed_steps = 0;
        // After a panic nothing of the run is used again; the base is never written to.
        let result = catch_unwind(AssertUnwindSafe(|| self.run(task, &mut completed_steps)));
        let (cause, suspects) = match result {
            Ok(Ok(())) => (None, Vec::new()),
            Ok(Err(Stop::Dropped)) => return,
            Ok(Err(Stop::Failed(error))) => (Some(error.to_string()), suspects(&error)),
            Err(panic) => (Some(format!("the engine panicked: {}", panic_text(&*panic))), Vec::new()),
        };
        if let Some(cause) = cause {
            let failed = v1::WorkerFailed { completed_steps, cause, suspects };
            // A session that is gone has no one to tell.
            let _ = task.report(job_report::Kind::Failed(failed));
        }
        while !matches!(task.commands.blocking_recv(), None | Some(Command::Drop)) {}
    }

    fn run(&mut self, task: &mut Task, completed_steps: &mut u64) -> Result<(), Stop> {
        let base = self.base(task)?;
        let mut run = Run::prepare(&task.job, base)?;
        if let Some(bytes) = task.checkpoint.take() {
            run.restore(&bytes)?;
        }
        *completed_steps = run.completed_steps();
        let facts = Some(facts_message(run.facts()));
        let prepared = v1::RunPrepared { facts, completed_steps: *completed_steps };
        task.report(job_report::Kind::Prepared(prepared))?;
        task.await_start()?;
        run.join(Group::form(&task.group(), Some(&self.listener))?)?;
        let state = train(&mut run, task, completed_steps)?;
        let files = if state == JobState::Succeeded && task.is_first() {
            task.upload_result(&run)?
        } else {
            Vec::new()
        };
        task.report(job_report::Kind::Ended(v1::Ended { state: state.name().to_owned(), files }))
    }

    /// The job's base: the one in memory if it is the same, else read now, after the other has been let go.
    fn base(&mut self, task: &Task) -> Result<Arc<Base>, Stop> {
        let started = Instant::now();
        let model = &task.job.model;
        let key = BaseKey::of(&model.base, model.dtype).map_err(TrainError::from)?;
        let known = self.cached.take().filter(|(cached, _)| *cached == key);
        let cached = known.is_some();
        let base = match known {
            Some((_, base)) => base,
            None => Arc::new(Base::load(&model.base, model.dtype).map_err(TrainError::from)?),
        };
        self.cached = Some((key, Arc::clone(&base)));
        let ready = v1::BaseReady {
            worker: String::new(),
            sha256: base.sha256().to_owned(),
            cached,
            seconds: started.elapsed().as_secs_f64(),
        };
        task.report(job_report::Kind::BaseReady(ready))?;
        Ok(base)
    }
}

/// Steps until the run ends or pauses.
fn train(run: &mut Run, task: &mut Task, completed_steps: &mut u64) -> Result<JobState, Stop> {
    let mut pause = false;
    while !run.is_finished() {
        pause |= task.pause_wanted()?;
        let report = run.step(pause)?;
        *completed_steps = report.metrics.step;
        let paused = report.outcome == StepOutcome::Paused;
        if task.is_first() {
            if let Some(text) = report.notice {
                let notice = v1::Notice { step: *completed_steps, text, ..v1::Notice::default() };
                task.report(job_report::Kind::Notice(notice))?;
            }
            task.report(job_report::Kind::StepFinished(v1::StepFinished {
                metrics: Some(metrics_message(&report.metrics)),
                logged: report.log,
                reduced_bytes: report.reduced_bytes,
            }))?;
            if report.checkpoint_due || paused {
                let name = artifact_name::Name::CheckpointStep(*completed_steps);
                task.send(Event::Upload { name, bytes: run.checkpoint()? })?;
            }
        }
        if paused {
            return Ok(JobState::Paused);
        }
    }
    Ok(JobState::Succeeded)
}

impl Task {
    fn is_first(&self) -> bool {
        self.assignment.rank == 0
    }

    fn group(&self) -> GroupSpec {
        let v1::Assignment { job_id, generation, rank, peers, token, .. } = &self.assignment;
        GroupSpec {
            job: job_id.clone(),
            generation: *generation,
            rank: *rank as usize,
            peers: peers.clone(),
            token: token.clone(),
            timeout: PEERS,
        }
    }

    fn report(&self, kind: job_report::Kind) -> Result<(), Stop> {
        self.send(Event::Report(kind))
    }

    /// Waits while the session is behind.
    fn send(&self, event: Event) -> Result<(), Stop> {
        self.events.blocking_send(event).map_err(|_| Stop::Dropped)
    }

    /// Uploads the result; returns its files' names.
    fn upload_result(&self, run: &Run) -> Result<Vec<String>, Stop> {
        let mut files = Vec::new();
        for artifact in run.export()? {
            files.push(artifact.name.clone());
            let name = artifact_name::Name::ResultFile(artifact.name);
            self.send(Event::Upload { name, bytes: artifact.bytes })?;
        }
        Ok(files)
    }

    /// Waits until all ranks are prepared. The session ends this wait if it ends itself.
    fn await_start(&mut self) -> Result<(), Stop> {
        loop {
            match self.commands.blocking_recv() {
                Some(Command::Start) => return Ok(()),
                Some(Command::Pause) => {}
                Some(Command::Drop) | None => return Err(Stop::Dropped),
            }
        }
    }

    /// Whether a pause was asked for since the last look.
    fn pause_wanted(&mut self) -> Result<bool, Stop> {
        let mut pause = false;
        loop {
            match self.commands.try_recv() {
                Ok(Command::Pause) => pause = true,
                Ok(Command::Start) => {}
                Ok(Command::Drop) | Err(mpsc::error::TryRecvError::Disconnected) => {
                    return Err(Stop::Dropped);
                }
                Err(mpsc::error::TryRecvError::Empty) => return Ok(pause),
            }
        }
    }
}

/// The ranks an error points at.
fn suspects(error: &TrainError) -> Vec<u32> {
    let ranks = match error {
        TrainError::Group(error) => error.suspects(),
        TrainError::Diverged { rank, .. } | TrainError::Message { rank } => vec![*rank],
        _ => Vec::new(),
    };
    ranks.into_iter().map(|rank| rank as u32).collect()
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

fn facts_message(facts: &RunFacts) -> v1::RunFacts {
    v1::RunFacts {
        total_steps: facts.total_steps,
        steps_per_epoch: facts.steps_per_epoch,
        trainable_parameters: facts.trainable_parameters,
        total_parameters: facts.total_parameters,
        adapter_bytes: facts.adapter_bytes,
    }
}

fn metrics_message(metrics: &StepMetrics) -> v1::StepMetrics {
    v1::StepMetrics {
        step: metrics.step,
        loss: metrics.loss,
        grad_norm: metrics.grad_norm,
        learning_rate: metrics.learning_rate,
        epoch: metrics.epoch,
        num_tokens: metrics.num_tokens,
        eval_loss: metrics.eval_loss,
    }
}
