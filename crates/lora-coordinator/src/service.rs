//! The service: the single task that owns every worker and every job that is neither paused nor
//! ended. It observes, lets the pure functions decide, and has [`Jobs`] apply the decisions.
//! [`validations`] run beside it.
//!
//! A change of a job's state, members or generation is committed to the store before it is sent.
//! The phase of a group is in memory only: after a restart, the rows of the store and the statuses
//! of the workers lead to the same phase or an earlier one.

pub(crate) mod command;
#[cfg(test)]
mod tests;
mod validations;

use std::collections::BTreeSet;

use lora_proto::v1;
use lora_spec::{DeviceMemory, JobSpec, JobState};
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use self::command::Command;
use self::validations::Validations;
use crate::Config;
use crate::admission::submit;
use crate::control::action::Action;
use crate::control::job::Job;
use crate::control::jobs::{ApplyError, Jobs};
use crate::control::member::observe;
use crate::control::reconcile::{Circumstances, gives_way, has_substitute, reconcile, validated};
use crate::control::request::{Answer, Request};
use crate::control::workers::{Outbox, SessionId, Workers};
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::scheduler::schedule;
use crate::store::{InsertOutcome, JobRow, Store, StoreError};

/// The interval at which leases and time limits are checked.
const RECONCILE_INTERVAL: Duration = Duration::from_millis(200);
/// The largest number of steps in one message.
const MAX_STEPS: usize = 4096;

/// The state of the service.
pub(crate) struct Service {
    store: Store,
    config: Config,
    commands: mpsc::Receiver<Command>,
    jobs: Jobs,
    workers: Workers,
    /// The time by which the workers of the previous coordinator process must have reconnected.
    reconnect_deadline: Instant,
    validations: Validations,
    /// Jobs to reconcile after the current command.
    dirty_jobs: BTreeSet<String>,
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
            jobs: Jobs::new(store.clone()),
            validations: Validations::new(store.clone()),
            store,
            config,
            commands,
            workers,
            reconnect_deadline,
            dirty_jobs: BTreeSet::new(),
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
                Some(job_id) = self.validations.finished() => {
                    self.dirty_jobs.insert(job_id);
                }
                _ = ticks.tick() => {
                    let idle = last_tick.elapsed().saturating_sub(2 * RECONCILE_INTERVAL);
                    last_tick = Instant::now();
                    self.workers.extend_leases(idle);
                    self.workers.expire(last_tick);
                    self.dirty_jobs.extend(self.jobs.iter().map(|job| job.row.id.clone()));
                }
            }
            self.settle().await;
        }
    }

    async fn execute(&mut self, command: Command) {
        // If the caller is gone, the answer is dropped.
        match command {
            Command::Submit { request, reply } => {
                let _ = reply.send(self.submit(*request).await);
            }
            Command::Request { job_id, request, reply } => {
                let _ = reply.send(self.request(&job_id, request, None).await);
            }
            Command::Resume { job_id, workers, reply } => {
                let _ = reply.send(self.request(&job_id, Request::Resume, workers).await);
            }
            Command::Workers { reply } => {
                let _ = reply.send(Ok(self.worker_messages()));
            }
            Command::Memory { reply } => {
                let _ = reply.send(Ok(self.available_memory()));
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
    async fn settle(&mut self) {
        // A second round reconciles the jobs that the first one scheduled.
        for _ in 0..2 {
            for job_id in std::mem::take(&mut self.dirty_jobs) {
                if let Err(error) = self.reconcile(&job_id).await {
                    tracing::error!(job = job_id, %error, "a job's next action failed, it is tried again");
                }
            }
            let limit = self.config.recovery.fruitless_generations;
            for (job_id, action) in schedule(self.jobs.iter().collect(), &self.workers, limit) {
                match self.jobs.apply(&job_id, action).await {
                    Ok(()) => {
                        self.dirty_jobs.insert(job_id);
                    }
                    Err(error) => {
                        tracing::error!(%error, "jobs are scheduled again");
                        break;
                    }
                }
            }
        }
        for worker in self.jobs.take_affected_workers() {
            let (assignment, goal) = desired_state(&self.jobs, &self.workers, &worker);
            self.workers.send_directive(&worker, assignment, goal);
        }
        debug_assert!(
            self.workers.iter().all(|(worker, _)| {
                let (assignment, goal) = desired_state(&self.jobs, &self.workers, worker);
                self.workers.is_directed(worker, assignment, goal)
            }),
            "a worker with another desired state was not affected",
        );
        self.metrics.observe(self.jobs.iter().map(Job::state), &self.workers);
    }

    /// Decides what a job needs next, and applies it.
    async fn reconcile(&mut self, job_id: &str) -> Result<(), ApplyError> {
        let validating = |job: &&Job| job.state() == JobState::Validating;
        if let Some(job) = self.jobs.get(job_id).filter(validating) {
            let available = self.available_memory();
            let Some(outcome) = self.validations.outcome(job) else { return Ok(()) };
            self.jobs.apply(job_id, validated(outcome, &available)).await?;
        }
        self.validations.forget(job_id);
        self.jobs.affect_members(job_id);
        let Some(job) = self.jobs.get(job_id).filter(|job| job.state().is_active()) else { return Ok(()) };
        let circumstances = Circumstances {
            recovery: &self.config.recovery,
            now: Instant::now(),
            last_stored_step: self.store.last_step(job_id).await?,
            checkpoint_step: self.store.newest_checkpoint(job_id).await?.map_or(0, |found| found.step),
            gives_way: gives_way(job, self.jobs.iter()),
            has_substitute: has_substitute(job, &self.workers),
        };
        for action in reconcile(job, &observe(&job.row, &self.workers), circumstances) {
            self.jobs.apply(job_id, action).await?;
        }
        Ok(())
    }

    /// Marks a worker that reported, connected or disconnected: its job is reconciled, and the
    /// worker is sent its desired state.
    fn mark_worker_dirty(&mut self, worker: String) {
        self.dirty_jobs.extend(self.jobs.of_worker(&worker).map(|job| job.row.id.clone()));
        self.jobs.affect(worker);
    }

    async fn submit(&mut self, request: v1::SubmitJobRequest) -> Result<String, Refusal> {
        let row = submit::row(request)?;
        match self.jobs.insert(&row).await? {
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
                let spec = JobSpec::try_from(row.spec)?;
                let difference = spec.difference(&JobSpec::try_from(earlier.spec)?).map_or_else(
                    || "its inputs, priority or workers are others".to_owned(),
                    |error| format!("{} {}", error.field, error.message),
                );
                Err(Refusal::KeyTaken { job: earlier.id, difference })
            }
            InsertOutcome::MissingObjects(missing) => Err(Refusal::MissingInputs(missing)),
        }
    }

    /// Starts to process a job that is neither paused nor ended.
    async fn load_job(&mut self, row: JobRow) -> Result<(), StoreError> {
        let id = row.id.clone();
        let Some(job) = self.jobs.load(row).await? else { return Ok(()) };
        for member in &job.row.members {
            self.workers.expect_reconnect(&member.worker, &member.instance_id, &member.peer_address);
        }
        self.dirty_jobs.insert(id);
        Ok(())
    }

    /// The memory that jobs may use on each available worker. Empty until the workers of the
    /// previous process have had the time to reconnect: no job is too large for workers that are
    /// not known.
    fn available_memory(&self) -> Vec<DeviceMemory> {
        let all_known = Instant::now() >= self.reconnect_deadline;
        let available = self.workers.iter().filter(|(_, worker)| all_known && worker.is_available());
        available.map(|(_, worker)| worker.memory()).collect()
    }

    /// Does what a user asks of a job. `workers` replaces the number of workers of a job that is
    /// resumed.
    async fn request(
        &mut self,
        job_id: &str,
        request: Request,
        workers: Option<v1::WorkersSpec>,
    ) -> Result<(), Refusal> {
        let state = self.jobs.load_stopped(job_id).await?;
        let done = match request.answer(state) {
            Answer::Nothing => Ok(()),
            Answer::Apply(action) => self.jobs.apply(job_id, action).await.map_err(Refusal::from),
            Answer::Resume => self.resume(job_id, workers).await,
            Answer::Refuse => {
                Err(Refusal::NotPossible { job: job_id.to_owned(), state, wanted: request.wanted() })
            }
        };
        self.jobs.release_if_stopped(job_id);
        self.dirty_jobs.insert(job_id.to_owned());
        done
    }

    async fn resume(&mut self, job_id: &str, workers: Option<v1::WorkersSpec>) -> Result<(), Refusal> {
        let Some(job) = self.jobs.get(job_id) else { return Ok(()) };
        let mut message = job.row.spec.clone();
        message.workers = workers.or(message.workers);
        let spec = JobSpec::try_from(message)?;
        spec.check()?;
        let message = Box::new(v1::JobSpec::try_from(&spec)?);
        // With another number of workers, each worker needs another amount of memory.
        let is_plan_current = job.row.requirements.is_none() || spec.workers == job.spec.workers;
        let is_valid = job.row.validated && is_plan_current;
        self.jobs.apply(job_id, Action::Resume { spec: Box::new(spec), message, is_valid }).await?;
        Ok(())
    }

    fn admit(&mut self, hello: v1::Hello, outbox: Outbox) -> Result<SessionId, Refusal> {
        let name = hello.name.clone();
        let session = self.workers.admit(hello, outbox)?;
        self.mark_worker_dirty(name);
        Ok(session)
    }

    /// Stores finished steps and acknowledges them to all members. Each member keeps a step until
    /// it is acknowledged.
    async fn steps(&mut self, session: SessionId, steps: v1::Steps) -> Result<(), ApplyError> {
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
        if self.jobs.get(&job_id).is_none_or(|job| !job.has_member(&worker)) {
            // The worker is no longer a member; the acknowledgement lets it discard the steps.
            self.workers.acknowledge(&worker, ack);
            return Ok(());
        }
        let count = steps.len() as u64;
        self.jobs.apply(&job_id, Action::AddSteps(steps)).await?;
        self.metrics.count_steps(count);
        for member in self.jobs.get(&job_id).iter().flat_map(|job| &job.row.members) {
            self.workers.acknowledge(&member.worker, ack.clone());
        }
        self.dirty_jobs.insert(job_id);
        Ok(())
    }

    fn worker_messages(&self) -> Vec<v1::Worker> {
        let mut messages = self.workers.messages();
        for message in &mut messages {
            let Some(job) = self.jobs.of_worker(&message.name) else { continue };
            message.job_id = Some(job.row.id.clone());
            let rank = job.row.members.iter().position(|member| member.worker == message.name);
            message.rank = rank.map(|rank| rank as u32);
        }
        messages
    }
}

fn desired_state<'a>(
    jobs: &'a Jobs,
    workers: &Workers,
    worker: &str,
) -> (Option<&'a v1::Assignment>, v1::Goal) {
    jobs.of_worker(worker).map_or((None, v1::Goal::Unspecified), |job| job.desired_state(worker, workers))
}
