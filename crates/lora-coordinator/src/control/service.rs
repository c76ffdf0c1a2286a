//! The service: the single task that owns every worker and every job that is neither paused nor
//! ended, and makes all changes to them.
//!
//! Every decision is committed to the store before it is sent, and no decision is in memory only:
//! after a restart, the rows of the store and the statuses of the workers are enough to continue.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lora_proto::v1;
use lora_spec::{FieldError, JobSpec, JobState, MemoryLimit};
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::Config;
use crate::admission::inputs;
use crate::admission::validate::{self, ValidationOutcome};
use crate::control::command::{Command, Outbox, SessionId};
use crate::control::job::{Job, state_changed};
use crate::control::workers::Workers;
use crate::metrics::Metrics;
use crate::rpc::refusal::Refusal;
use crate::store::{InsertOutcome, JobRow, Store, StoreError};

/// The interval at which leases and time limits are checked.
const RECONCILE_INTERVAL: Duration = Duration::from_millis(200);
/// The number of validations at the same time; each reads a dataset.
const MAX_CONCURRENT_VALIDATIONS: usize = 2;
const MAX_KEY_BYTES: usize = 128;
const PRIORITIES: std::ops::RangeInclusive<i32> = -100..=100;
/// The largest number of steps in one message.
const MAX_STEPS: usize = 4096;

/// The state of the service.
pub(crate) struct Service {
    pub(crate) store: Store,
    pub(crate) config: Config,
    commands: mpsc::Receiver<Command>,
    /// Jobs that are neither paused nor ended, by id.
    pub(crate) jobs: BTreeMap<String, Job>,
    pub(crate) workers: Workers,
    /// The time by which the workers of the previous coordinator process must have reconnected.
    reconnect_deadline: Instant,
    /// The running validations of jobs.
    validations: JoinSet<(String, std::io::Result<ValidationOutcome>)>,
    /// Limits the validations that run at the same time.
    validation_permits: Arc<Semaphore>,
    /// Jobs to reconcile after the current command.
    pub(crate) dirty_jobs: BTreeSet<String>,
    /// Workers whose desired state may have changed.
    dirty_workers: BTreeSet<String>,
    metrics: Metrics,
}

impl Service {
    /// Creates the service from the store. Workers that had a job have one lease to reconnect.
    pub(crate) async fn new(
        store: Store,
        config: Config,
        commands: mpsc::Receiver<Command>,
        metrics: Metrics,
    ) -> Result<Self, StoreError> {
        let workers = Workers::new(config.workers.lease());
        let had_workers = store.term() > 1;
        let reconnect_deadline =
            Instant::now() + if had_workers { config.workers.lease() } else { Duration::ZERO };
        let mut service = Self {
            store,
            config,
            commands,
            jobs: BTreeMap::new(),
            workers,
            reconnect_deadline,
            validations: JoinSet::new(),
            validation_permits: Arc::new(Semaphore::new(MAX_CONCURRENT_VALIDATIONS)),
            dirty_jobs: BTreeSet::new(),
            dirty_workers: BTreeSet::new(),
            metrics,
        };
        for row in service.store.load_active().await? {
            service.load_job(row).await?;
        }
        Ok(service)
    }

    /// Runs until `stop`. If the store fails while a job is reconciled, the next tick tries again.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut ticks = interval(RECONCILE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_tick = Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                command = self.commands.recv() => match command {
                    Some(command) => self.execute(command).await,
                    None => break,
                },
                Some(checked) = self.validations.join_next() => match checked {
                    Ok((job_id, found)) => self.apply_validation(&job_id, found).await,
                    Err(error) => tracing::error!(%error, "the validation of a job failed"),
                },
                _ = ticks.tick() => {
                    let idle = last_tick.elapsed().saturating_sub(2 * RECONCILE_INTERVAL);
                    last_tick = Instant::now();
                    self.workers.extend_leases(idle);
                    self.workers.expire(last_tick);
                    self.dirty_jobs.extend(self.jobs.keys().cloned());
                }
            }
            self.reconcile_dirty().await;
        }
    }

    async fn execute(&mut self, command: Command) {
        // If the caller is gone, the answer is dropped.
        match command {
            Command::Submit { request, reply } => {
                let _ = reply.send(self.submit(*request).await);
            }
            Command::Cancel { job_id, reply } => {
                let _ = reply.send(self.cancel(&job_id).await);
            }
            Command::Pause { job_id, reply } => {
                let _ = reply.send(self.pause(&job_id).await);
            }
            Command::Resume { job_id, workers, reply } => {
                let _ = reply.send(self.resume(&job_id, workers).await);
            }
            Command::Workers { reply } => {
                let _ = reply.send(Ok(self.worker_messages()));
            }
            Command::Hello { hello, outbox, reply } => {
                let _ = reply.send(self.admit(*hello, outbox));
            }
            Command::Status { session, status } => {
                if let Some(worker) = self.workers.record_message(session, Some(*status)) {
                    self.mark_worker_dirty(worker);
                }
            }
            Command::Steps { session, steps } => {
                let job_id = steps.job_id.clone();
                if let Err(error) = self.steps(session, steps).await {
                    tracing::error!(job = job_id, %error, "cannot store steps");
                }
            }
            Command::WorkerGone { session, cause } => {
                if let Some(worker) = self.workers.disconnected(session, &cause) {
                    self.mark_worker_dirty(worker);
                }
            }
        }
    }

    /// Reconciles the jobs that may have changed, schedules jobs, and sends directives to the
    /// workers whose desired state may have changed.
    async fn reconcile_dirty(&mut self) {
        // A second round reconciles the jobs that the first one scheduled.
        for _ in 0..2 {
            for job_id in std::mem::take(&mut self.dirty_jobs) {
                let Some(mut job) = self.jobs.remove(&job_id) else { continue };
                let members = job.row.members.iter().map(|member| member.worker.clone());
                self.dirty_workers.extend(members.collect::<Vec<_>>());
                if let Err(error) = self.reconcile(&mut job).await {
                    tracing::error!(job = job_id, %error, "the store failed, the job is reconciled again");
                }
                if !job.state().is_stopped() {
                    self.jobs.insert(job_id, job);
                }
            }
            if let Err(error) = self.schedule().await {
                tracing::error!(%error, "the store failed, jobs are scheduled again");
            }
        }
        for worker in std::mem::take(&mut self.dirty_workers) {
            let job = self.jobs.values().find(|job| job.has_member(&worker));
            let (assignment, goal) =
                job.map_or((None, v1::Goal::Unspecified), |job| job.desired_state(&worker));
            self.workers.send_directive(&worker, assignment, goal);
        }
        self.metrics.observe(self.jobs.values().map(Job::state), &self.workers);
    }

    /// Marks a worker that reported, connected or disconnected: its job is reconciled, and the
    /// worker is sent its desired state.
    fn mark_worker_dirty(&mut self, worker: String) {
        let jobs = self.jobs.values().filter(|job| job.has_member(&worker)).map(|job| job.row.id.clone());
        self.dirty_jobs.extend(jobs);
        self.dirty_workers.insert(worker);
    }

    /// Marks workers whose desired state may have changed.
    pub(crate) fn mark_workers_dirty(&mut self, workers: impl IntoIterator<Item = String>) {
        self.dirty_workers.extend(workers);
    }

    async fn submit(&mut self, request: v1::SubmitJobRequest) -> Result<String, Refusal> {
        let mut hash = Sha256::new();
        hash.update(
            v1::SubmitJobRequest { idempotency_key: String::new(), ..request.clone() }.encode_to_vec(),
        );
        let v1::SubmitJobRequest { idempotency_key, job, inputs, priority } = request;
        let inputs = inputs.unwrap_or_default();
        let spec = submitted_spec(job.unwrap_or_default(), &inputs)?;
        if idempotency_key.len() > MAX_KEY_BYTES {
            let message =
                format!("has {} bytes; it must have at most {MAX_KEY_BYTES}", idempotency_key.len());
            return Err(FieldError::new("idempotency_key", message).into());
        }
        if !PRIORITIES.contains(&priority) {
            let message =
                format!("is {priority}; it must be from {} to {}", PRIORITIES.start(), PRIORITIES.end());
            return Err(FieldError::new("priority", message).into());
        }
        let row = JobRow {
            id: format!("{}-{:08x}", spec.name, rand::random::<u32>()),
            idempotency_key,
            request_sha256: hash.finalize().to_vec(),
            spec: v1::JobSpec::try_from(&spec)?,
            inputs,
            priority,
            ..JobRow::default()
        };
        match self.store.insert_job(&row, vec![state_changed(&row)]).await? {
            InsertOutcome::New(row) => {
                let id = row.id.clone();
                tracing::info!(job = id, "job submitted");
                self.load_job(row).await?;
                Ok(id)
            }
            InsertOutcome::Existing(earlier) if earlier.request_sha256 == row.request_sha256 => {
                Ok(earlier.id)
            }
            InsertOutcome::Existing(earlier) => {
                let other = JobSpec::try_from(earlier.spec.clone())?;
                let difference = spec.difference(&other).map_or_else(
                    || "with other inputs, priority or workers".to_owned(),
                    |error| format!("{} {}", error.field, error.message),
                );
                Err(Refusal::KeyTaken { job: earlier.id, difference })
            }
            InsertOutcome::MissingObjects(missing) => Err(Refusal::MissingInputs(missing)),
        }
    }

    /// Starts to process a job that is neither paused nor ended.
    async fn load_job(&mut self, row: JobRow) -> Result<(), StoreError> {
        let checkpoint = self.store.newest_checkpoint(&row.id).await?;
        let mut job = match Job::new(row.clone()) {
            Ok(job) => job,
            Err(error) => {
                tracing::error!(job = row.id, %error, "cannot read the job's settings, the job is skipped");
                return Ok(());
            }
        };
        if job.training_started {
            job.recorded_bases.clone_from(&job.row.members);
        }
        for member in &job.row.members {
            self.workers.expect_reconnect(&member.worker, &member.instance_id, &member.peer_address);
        }
        job.assign(checkpoint);
        if job.state() == JobState::Validating {
            self.validate(&job);
        }
        if job.state() == JobState::Waiting {
            job.pending_group = Some(crate::control::reconcile::PendingGroup::resumed(&job));
        }
        self.dirty_jobs.insert(job.row.id.clone());
        self.jobs.insert(job.row.id.clone(), job);
        Ok(())
    }

    fn validate(&mut self, job: &Job) {
        let (store, spec, inputs) = (self.store.clone(), job.spec.clone(), job.row.inputs.clone());
        let id = job.row.id.clone();
        let validation_permits = Arc::clone(&self.validation_permits);
        self.validations.spawn(async move {
            // The semaphore is never closed.
            let _permit = validation_permits.acquire().await;
            let check = tokio::task::spawn_blocking(move || validate::check(&store, &spec, &inputs));
            (id, check.await.unwrap_or_else(|error| Err(std::io::Error::other(error))))
        });
    }

    /// Applies the result of the validation of a job, unless the job was paused or cancelled in the
    /// meantime. A paused job is validated again when it is resumed.
    async fn apply_validation(&mut self, job_id: &str, found: std::io::Result<ValidationOutcome>) {
        let Some(job) = self.jobs.get_mut(job_id).filter(|job| job.state() == JobState::Validating) else {
            return;
        };
        // Until the workers of the previous process have reconnected, a job is not too large: the
        // scheduler waits for a worker that is large enough.
        let all_known = Instant::now() >= self.reconnect_deadline;
        let available = self.workers.iter().filter(|(_, worker)| all_known && worker.is_available());
        let available: Vec<MemoryLimit> = available.map(|(_, worker)| worker.memory()).collect();
        let valid = match found {
            Ok(ValidationOutcome::Problem(problem)) => Err(problem),
            Ok(ValidationOutcome::Valid(requirements)) => {
                match requirements.as_ref().and_then(|it| validate::too_large(it, &available)) {
                    Some(problem) => Err(problem),
                    None => Ok(requirements),
                }
            }
            Err(error) => Err(format!("the inputs cannot be validated: {error}")),
        };
        let stored = match valid {
            Ok(requirements) => {
                let change = |row: &mut JobRow| {
                    row.validated = true;
                    row.requirements = requirements.map(|requirements| *requirements);
                };
                job.transition_to(&self.store, JobState::Queued, Vec::new(), change).await
            }
            Err(cause) => {
                let failure = v1::Failure { cause, ..v1::Failure::default() };
                job.transition_to(&self.store, JobState::Failed, Vec::new(), |row| {
                    row.failure = Some(failure)
                })
                .await
            }
        };
        if let Err(error) = stored {
            tracing::error!(job = job_id, %error, "the store failed, the job is validated again");
            if let Some(job) = self.jobs.remove(job_id) {
                self.validate(&job);
                self.jobs.insert(job_id.to_owned(), job);
            }
            return;
        }
        self.dirty_jobs.insert(job_id.to_owned());
    }

    async fn cancel(&mut self, job_id: &str) -> Result<(), Refusal> {
        let Some(job) = self.jobs.get_mut(job_id) else {
            let mut job = self.load_stopped(job_id).await?;
            return match job.state() {
                JobState::Cancelled => Ok(()),
                state @ JobState::Succeeded => {
                    Err(Refusal::NotPossible { job: job_id.to_owned(), state, wanted: "cancelled" })
                }
                _ => Ok(job.transition_to(&self.store, JobState::Cancelled, Vec::new(), |_| ()).await?),
            };
        };
        let next = match job.state() {
            JobState::Cancelling => return Ok(()),
            JobState::Validating | JobState::Queued => JobState::Cancelled,
            _ => JobState::Cancelling,
        };
        job.transition_to(&self.store, next, Vec::new(), |_| ()).await?;
        self.dirty_jobs.insert(job_id.to_owned());
        Ok(())
    }

    async fn pause(&mut self, job_id: &str) -> Result<(), Refusal> {
        let Some(job) = self.jobs.get_mut(job_id) else {
            let state = self.load_stopped(job_id).await?.state();
            return match state {
                JobState::Paused => Ok(()),
                _ => Err(Refusal::NotPossible { job: job_id.to_owned(), state, wanted: "paused" }),
            };
        };
        let next = match job.state() {
            JobState::Pausing => return Ok(()),
            state @ JobState::Cancelling => {
                return Err(Refusal::NotPossible { job: job_id.to_owned(), state, wanted: "paused" });
            }
            JobState::Validating | JobState::Queued => JobState::Paused,
            _ => JobState::Pausing,
        };
        job.transition_to(&self.store, next, Vec::new(), |_| ()).await?;
        self.dirty_jobs.insert(job_id.to_owned());
        Ok(())
    }

    async fn resume(&mut self, job_id: &str, workers: Option<v1::WorkersSpec>) -> Result<(), Refusal> {
        if let Some(job) = self.jobs.get(job_id) {
            return match job.state() {
                state @ (JobState::Cancelling | JobState::Pausing) => {
                    Err(Refusal::NotPossible { job: job_id.to_owned(), state, wanted: "resumed" })
                }
                // The job continues already.
                _ => Ok(()),
            };
        }
        let mut job = self.load_stopped(job_id).await?;
        let state = job.state();
        if !matches!(state, JobState::Paused | JobState::Failed) {
            return Err(Refusal::NotPossible { job: job_id.to_owned(), state, wanted: "resumed" });
        }
        let mut message = job.row.spec.clone();
        message.workers = workers.or(message.workers);
        let spec = JobSpec::try_from(message)?;
        spec.check()?;
        let message = v1::JobSpec::try_from(&spec)?;
        // With another number of workers, each worker needs another amount of memory.
        let is_plan_current = job.row.requirements.is_none() || spec.workers == job.spec.workers;
        let validated = job.row.validated && is_plan_current;
        let next = if validated { JobState::Queued } else { JobState::Validating };
        let change = |row: &mut JobRow| {
            row.spec = message;
            row.validated = validated;
            row.fruitless = 0;
        };
        job.transition_to(&self.store, next, Vec::new(), change).await?;
        Ok(self.load_job(job.row).await?)
    }

    /// Loads a job that is paused or has ended.
    async fn load_stopped(&self, job_id: &str) -> Result<Job, Refusal> {
        let row = self.store.load_job(job_id).await?;
        Ok(Job::new(row.ok_or_else(|| Refusal::UnknownJob(job_id.to_owned()))?)?)
    }

    fn admit(&mut self, hello: v1::Hello, outbox: Outbox) -> Result<SessionId, Refusal> {
        let name = hello.name.clone();
        let session = self.workers.admit(hello, outbox)?;
        self.mark_worker_dirty(name);
        Ok(session)
    }

    /// Stores finished steps and acknowledges them to all members. Each member keeps a step until
    /// it is acknowledged.
    async fn steps(&mut self, session: SessionId, steps: v1::Steps) -> Result<(), StoreError> {
        let Some(worker) = self.workers.record_message(session, None) else { return Ok(()) };
        let v1::Steps { job_id, steps, .. } = steps;
        let numbers: Vec<u64> =
            steps.iter().map(|step| step.metrics.map_or(0, |metrics| metrics.step)).collect();
        // The numbers must start at 1 or above, and ascend.
        let ascending = [&[0], numbers.as_slice()].concat().is_sorted_by(|a, b| a < b);
        let Some(&newest) = numbers.last().filter(|_| ascending && steps.len() <= MAX_STEPS) else {
            tracing::warn!(worker, job = job_id, "invalid steps are ignored");
            return Ok(());
        };
        let ack = v1::StepsAck { job_id: job_id.clone(), step: newest };
        let Some(job) = self.jobs.get_mut(&job_id).filter(|job| job.has_member(&worker)) else {
            // The worker is no longer a member; the acknowledgement lets it discard the steps.
            self.workers.acknowledge(&worker, ack);
            return Ok(());
        };
        self.store.add_steps(&job_id, &steps).await?;
        self.metrics.count_steps(steps.len() as u64);
        job.row.completed_steps = job.row.completed_steps.max(newest);
        for member in &job.row.members {
            self.workers.acknowledge(&member.worker, ack.clone());
        }
        self.dirty_jobs.insert(job_id);
        Ok(())
    }

    fn worker_messages(&self) -> Vec<v1::Worker> {
        let mut messages = self.workers.messages();
        for message in &mut messages {
            let job = self.jobs.values().find(|job| job.has_member(&message.name));
            let Some(job) = job else { continue };
            message.job_id = Some(job.row.id.clone());
            let rank = job.row.members.iter().position(|member| member.worker == message.name);
            message.rank = rank.map(|rank| rank as u32);
        }
        messages
    }
}

/// Checks the settings of a submit, and returns them. A missing path is replaced by the name of the
/// input.
pub(crate) fn submitted_spec(mut job: v1::JobSpec, inputs: &v1::Inputs) -> Result<JobSpec, FieldError> {
    let data = job.data.get_or_insert_default();
    data.train = data.train.take().or_else(|| Some(inputs.train.as_ref()?.name.clone()));
    data.eval = data.eval.take().or_else(|| Some(inputs.eval.as_ref()?.name.clone()));
    let model = job.model.get_or_insert_default();
    model.base = model.base.take().or_else(|| base_name(inputs.base.as_ref()?));
    let spec = JobSpec::try_from(job)?;
    spec.check()?;
    inputs::check(inputs, &spec)?;
    Ok(spec)
}

fn base_name(base: &v1::Base) -> Option<String> {
    Some(match base.source.as_ref()? {
        v1::base::Source::Files(_) => "base".to_owned(),
        v1::base::Source::Url(name) | v1::base::Source::Path(name) => name.clone(),
    })
}
