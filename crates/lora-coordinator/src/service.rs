//! The loop that owns jobs and workers.
//!
//! It runs on a thread of its own: it is synchronous, writes files, and takes one command after another, so that no two
//! changes meet.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::StreamExt;
use lora_proto::v1::{self, coordinator_message, job_command, job_event};
use lora_spec::{FieldError, JobSpec, JobState};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::command::{ArtifactName, Command, EventStream, Outbox, SessionId, Upload};
use crate::group::Group;
use crate::job::Job;
use crate::output_dir::{OutputDir, check_output_dir, checkpoint_name, checkpoint_path};
use crate::refusal::Refusal;

/// Jobs and workers, and all that changes them.
pub(crate) struct Service {
    commands: mpsc::Receiver<Command>,
    /// In the order they came.
    pub(crate) jobs: Vec<Job>,
    /// By session, so in the order they came.
    pub(crate) workers: BTreeMap<SessionId, Worker>,
    next_session: SessionId,
    retained_events: usize,
}

/// A connected worker.
pub(crate) struct Worker {
    pub(crate) hello: v1::Hello,
    pub(crate) outbox: Outbox,
    /// The job whose memory it holds, and in which generation.
    pub(crate) holds: Option<(String, u64)>,
}

impl Service {
    pub(crate) fn new(commands: mpsc::Receiver<Command>, retained_events: usize) -> Self {
        Self { commands, jobs: Vec::new(), workers: BTreeMap::new(), next_session: 1, retained_events }
    }

    /// Works until told to shut down. Blocks; `runtime` keeps the time.
    pub(crate) fn run(mut self, runtime: &Handle) {
        loop {
            let settles_at = self.jobs.iter().filter_map(|job| job.group.as_ref()?.settles_at()).min();
            let command = match settles_at {
                None => self.commands.blocking_recv(),
                Some(at) => match runtime.block_on(async { timeout_at(at, self.commands.recv()).await }) {
                    Ok(command) => command,
                    Err(_) => {
                        self.settle(Instant::now());
                        continue;
                    }
                },
            };
            match command {
                None | Some(Command::Shutdown) => break,
                Some(command) => self.execute(command),
            }
        }
        for worker in self.workers.values() {
            let shutdown = coordinator_message::Kind::Shutdown(v1::Shutdown {});
            // One that has no room for it ends when its stream does.
            let _ = worker.outbox.try_send(Ok(v1::CoordinatorMessage { kind: Some(shutdown) }));
        }
        for job in &self.jobs {
            job.log.close();
        }
    }

    /// An asker who has gone does not need the answer.
    fn execute(&mut self, command: Command) {
        match command {
            Command::Submit { request, reply } => {
                let _ = reply.send(self.submit(*request));
                self.schedule();
            }
            Command::Get { job_id, reply } => {
                let _ = reply.send(self.job(&job_id).map(|job| job.message()));
            }
            Command::Watch { job_id, from, reply } => {
                let _ = reply.send(self.watch(&job_id, from));
            }
            Command::Pause { job_id, reply } => {
                let _ = reply.send(self.pause(&job_id));
            }
            Command::Hello { hello, outbox, reply } => {
                let _ = reply.send(self.welcome(hello, outbox));
                self.schedule();
            }
            Command::Report { session, report } => {
                if let Err(breach) = self.report(session, report) {
                    self.lose(session, &format!("it broke the protocol: {breach}"));
                }
                self.schedule();
            }
            Command::WorkerGone { session, cause } => self.lose(session, &cause),
            Command::StageUpload { upload, reply } => {
                let _ = reply.send(self.stage(&upload));
            }
            Command::CommitUpload { upload, path, reply } => {
                let _ = reply.send(self.commit(&upload, path));
            }
            Command::Locate { job_id, name, reply } => {
                let _ = reply.send(self.job(&job_id).map(|job| match name {
                    ArtifactName::Checkpoint { step } => checkpoint_path(&job.output_path, step),
                    ArtifactName::Result { file } => job.output_path.join(file),
                }));
            }
            // The loop ends before it comes here.
            Command::Shutdown => {}
        }
    }

    fn submit(&mut self, request: v1::SubmitJobRequest) -> Result<String, Refusal> {
        let v1::SubmitJobRequest { job, output_dir, resume } = request;
        let spec = JobSpec::try_from(job.unwrap_or_default())?;
        spec.check()?;
        let output_path = PathBuf::from(&output_dir);
        if !output_path.is_absolute() {
            let message = format!("{output_dir:?} is no absolute path");
            return Err(FieldError::new("output_dir", message).into());
        }
        check_output_dir(&output_path, resume)?;
        let id = format!("{}-{:06x}", spec.name, rand::random::<u32>() >> 8);
        let output = if resume { Some(OutputDir::reopen(&output_path, &spec)?) } else { None };
        let checkpoint_step = output.as_ref().map_or(Ok(None), OutputDir::newest_checkpoint)?;
        let mut job = Job::new(id.clone(), spec, output_path, self.retained_events);
        job.output = output;
        job.checkpoint_step = checkpoint_step;
        if !job.become_state(JobState::Queued) {
            tracing::error!(job = id, "a new job cannot be queued");
        }
        self.jobs.push(job);
        Ok(id)
    }

    fn watch(&self, job_id: &str, from: u64) -> Result<EventStream, Refusal> {
        Ok(Arc::clone(&self.job(job_id)?.log).follow(from).boxed())
    }

    fn pause(&mut self, job_id: &str) -> Result<v1::Job, Refusal> {
        let job = find(&mut self.jobs, job_id)?;
        match job.state() {
            JobState::Validating | JobState::Queued => {
                if job.become_state(JobState::Paused) {
                    job.output = None;
                }
            }
            // Nothing is computed yet that a checkpoint would keep.
            JobState::Preparing => {
                if job.become_state(JobState::Pausing)
                    && let Some(group) = &mut job.group
                {
                    group.dropped = true;
                }
                self.tell_group(job_id, job_command::Kind::Drop(v1::Drop {}));
            }
            JobState::Running => {
                if job.become_state(JobState::Pausing) {
                    self.tell_group(job_id, job_command::Kind::Pause(v1::Pause {}));
                }
            }
            JobState::Pausing | JobState::Paused => {}
            state @ (JobState::Succeeded | JobState::Failed) => {
                return Err(Refusal::AlreadyOver { job: job_id.to_owned(), state });
            }
        }
        Ok(self.job(job_id)?.message())
    }

    fn welcome(&mut self, hello: v1::Hello, outbox: Outbox) -> Result<SessionId, Refusal> {
        for (field, value) in [
            ("hello.name", &hello.name),
            ("hello.numerics_id", &hello.numerics_id),
            ("hello.peer_address", &hello.peer_address),
        ] {
            if value.is_empty() || value.len() > 256 {
                let message = format!("has {} bytes; it must have 1 to 256", value.len());
                return Err(FieldError::new(field, message).into());
            }
        }
        if self.workers.values().any(|worker| worker.hello.name == hello.name) {
            return Err(Refusal::NameTaken(hello.name));
        }
        tracing::info!(worker = hello.name, numerics = hello.numerics_id, "worker connected");
        let session = self.next_session;
        self.next_session += 1;
        self.workers.insert(session, Worker { hello, outbox, holds: None });
        Ok(session)
    }

    /// Gives waiting jobs, oldest first, to idle workers.
    fn schedule(&mut self) {
        let waiting: Vec<String> = self
            .jobs
            .iter()
            .filter(|job| job.state() == JobState::Queued)
            .map(|job| job.id.clone())
            .collect();
        for job_id in waiting {
            let idle: Vec<SessionId> = self
                .workers
                .iter()
                .filter(|(_, worker)| worker.holds.is_none())
                .map(|(session, _)| *session)
                .collect();
            let Ok(job) = find(&mut self.jobs, &job_id) else { continue };
            if idle.len() < job.spec.workers.min {
                continue;
            }
            let chosen: Vec<SessionId> = idle.into_iter().take(job.spec.workers.max).collect();
            self.assign(&job_id, &chosen);
        }
    }

    fn assign(&mut self, job_id: &str, sessions: &[SessionId]) {
        let Ok(job) = find(&mut self.jobs, job_id) else { return };
        let hellos: Vec<&v1::Hello> =
            sessions.iter().filter_map(|session| Some(&self.workers.get(session)?.hello)).collect();
        let alike = unequal_numerics(&hellos).map_or(Ok(()), Err);
        let message =
            alike.and_then(|()| v1::JobSpec::try_from(&job.spec).map_err(|error| error.to_string()));
        let message = match message {
            Ok(message) => message,
            Err(cause) => {
                let failure = v1::Failure { cause, ..Default::default() };
                self.fail(job_id, failure);
                return;
            }
        };
        if !job.become_state(JobState::Preparing) {
            return;
        }
        job.generation += 1;
        let workers: Vec<String> = hellos.iter().map(|hello| hello.name.clone()).collect();
        let peers: Vec<String> = hellos.iter().map(|hello| hello.peer_address.clone()).collect();
        let token = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
        job.group = Some(Group::new(sessions.iter().copied().zip(workers.iter().cloned())));
        job.record(job_event::Kind::Assigned(v1::Assigned {
            generation: job.generation,
            workers,
            checkpoint_step: job.checkpoint_step,
        }));
        let assignment = v1::Assignment {
            job_id: job_id.to_owned(),
            generation: job.generation,
            job: Some(message),
            rank: 0,
            peers,
            token,
            checkpoint_step: job.checkpoint_step,
        };
        for (rank, session) in sessions.iter().enumerate() {
            // Losing one of them on the way fails the job; the rest need not hear of it.
            if self.job(job_id).is_ok_and(|job| job.state() != JobState::Preparing) {
                break;
            }
            if let Some(worker) = self.workers.get_mut(session) {
                worker.holds = Some((job_id.to_owned(), assignment.generation));
            }
            let assignment = v1::Assignment { rank: rank as u32, ..assignment.clone() };
            self.send(*session, coordinator_message::Kind::Assignment(Box::new(assignment)));
        }
    }

    fn stage(&mut self, upload: &Upload) -> Result<PathBuf, Refusal> {
        let (output, _) = writable(find(&mut self.jobs, &upload.job_id)?, upload)?;
        Ok(match &upload.name {
            ArtifactName::Checkpoint { step } => {
                output.staging_path(upload.generation, &checkpoint_name(*step))
            }
            ArtifactName::Result { file } => output.staging_path(upload.generation, file),
        })
    }

    fn commit(&mut self, upload: &Upload, path: PathBuf) -> Result<(), Refusal> {
        let job = find(&mut self.jobs, &upload.job_id)?;
        let keep = job.spec.training.save_total_limit;
        let (output, group) = writable(job, upload)?;
        match &upload.name {
            ArtifactName::Checkpoint { step } => {
                let path = output.commit_checkpoint(&path, *step, keep)?;
                let path = path.display().to_string();
                let saved = v1::CheckpointSaved { step: *step, path };
                job.record(job_event::Kind::CheckpointSaved(saved));
            }
            ArtifactName::Result { file } => {
                group.staged.insert(file.clone(), path);
            }
        }
        Ok(())
    }

    /// Sends a command about a job to all its workers.
    pub(crate) fn tell_group(&mut self, job_id: &str, kind: job_command::Kind) {
        let Ok(job) = self.job(job_id) else { return };
        let command = v1::JobCommand { job_id: job.id.clone(), generation: job.generation, kind: Some(kind) };
        let held = Some((job.id.clone(), job.generation));
        let holders: Vec<SessionId> =
            self.workers.iter().filter(|(_, w)| w.holds == held).map(|(session, _)| *session).collect();
        for session in holders {
            self.send(session, coordinator_message::Kind::Command(command.clone()));
        }
    }

    /// A worker whose outbox is full or closed is lost.
    fn send(&mut self, session: SessionId, kind: coordinator_message::Kind) {
        let Some(worker) = self.workers.get(&session) else { return };
        if worker.outbox.try_send(Ok(v1::CoordinatorMessage { kind: Some(kind) })).is_err() {
            self.lose(session, "it takes no messages");
        }
    }

    pub(crate) fn job(&self, job_id: &str) -> Result<&Job, Refusal> {
        let found = self.jobs.iter().find(|job| job.id == job_id);
        found.ok_or_else(|| Refusal::UnknownJob(job_id.to_owned()))
    }
}

/// The job of this id.
pub(crate) fn find<'a>(jobs: &'a mut [Job], job_id: &str) -> Result<&'a mut Job, Refusal> {
    let found = jobs.iter_mut().find(|job| job.id == job_id);
    found.ok_or_else(|| Refusal::UnknownJob(job_id.to_owned()))
}

/// Where an upload goes, if its generation still has the job.
fn writable<'a>(job: &'a mut Job, upload: &Upload) -> Result<(&'a OutputDir, &'a mut Group), Refusal> {
    if upload.generation != job.generation {
        let (given, current) = (upload.generation, job.generation);
        return Err(Refusal::StaleGeneration { job: job.id.clone(), given, current });
    }
    let state = job.state();
    match (&job.output, &mut job.group) {
        (Some(output), Some(group)) if matches!(state, JobState::Running | JobState::Pausing) => {
            Ok((output, group))
        }
        _ => Err(Refusal::NotRunning { job: job.id.clone(), state }),
    }
}

/// Workers whose arithmetic differs cannot hold the same bits.
fn unequal_numerics(hellos: &[&v1::Hello]) -> Option<String> {
    let first = hellos.first()?;
    let other = hellos.iter().find(|hello| hello.numerics_id != first.numerics_id)?;
    Some(format!(
        "workers of one job must compute alike: {} is {:?}, {} is {:?}; run the same build on the same kind of machine",
        first.name, first.numerics_id, other.name, other.numerics_id
    ))
}
