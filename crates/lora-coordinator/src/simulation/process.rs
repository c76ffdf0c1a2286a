//! A simulated worker process: what it holds, and how it follows directives.

use lora_proto::v1::{self, Goal, Phase, coordinator_message};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::control::workers::{SessionId, has_state};

/// A worker process.
pub(super) struct Process {
    pub(super) name: String,
    pub(super) instance: u32,
    pub(super) is_alive: bool,
    pub(super) is_draining: bool,
    pub(super) connection: Option<(SessionId, mpsc::Receiver<Result<v1::CoordinatorMessage, tonic::Status>>)>,
    /// The newest directive that was received on this connection.
    pub(super) directive: v1::Directive,
    pub(super) held: Option<v1::HeldJob>,
    phase_since: Instant,
    /// The assignment of the job that is held.
    pub(super) assignment: Option<v1::Assignment>,
}

impl Process {
    pub(super) fn new(number: usize) -> Self {
        Self {
            name: format!("w{number}"),
            instance: 0,
            is_alive: true,
            is_draining: false,
            connection: None,
            directive: v1::Directive::default(),
            held: None,
            phase_since: Instant::now(),
            assignment: None,
        }
    }

    pub(super) fn goal(&self) -> Goal {
        self.directive.goal()
    }

    pub(super) fn enter(&mut self, phase: Phase) {
        if let Some(held) = &mut self.held {
            held.phase = phase as i32;
            self.phase_since = Instant::now();
        }
    }

    pub(super) fn phase(&self) -> Option<Phase> {
        self.held.as_ref().map(v1::HeldJob::phase)
    }

    /// Gives up a group that does not form within so many seconds.
    pub(super) fn give_up_forming(&mut self, seconds: f64) {
        if self.phase() == Some(Phase::Forming) && self.phase_since.elapsed().as_secs_f64() > seconds {
            self.enter(Phase::Broken);
        }
    }

    pub(super) fn completed_steps(&self) -> u64 {
        self.held.as_ref().map_or(0, |held| held.completed_steps)
    }

    pub(super) fn is_in(&self, job: &str, generation: u64) -> bool {
        self.is_alive
            && self.held.as_ref().is_some_and(|held| held.job_id == job && held.generation == generation)
    }

    pub(super) fn hello(&self) -> v1::Hello {
        v1::Hello {
            name: self.name.clone(),
            instance_id: format!("{}-{}", self.name, self.instance),
            numerics_id: "simulated".to_owned(),
            peer_address: format!("{}:1", self.name),
            status: Some(v1::WorkerStatus { directive: 0, ..self.status() }),
            ..v1::Hello::default()
        }
    }

    pub(super) fn status(&self) -> v1::WorkerStatus {
        let seconds_in_phase = self.phase_since.elapsed().as_secs_f64();
        let job = self.held.clone().map(|held| v1::HeldJob { seconds_in_phase, ..held });
        v1::WorkerStatus { job, draining: self.is_draining, directive: self.directive.number }
    }

    /// Reads the messages and does what the directive says. Returns the assignment whose state is
    /// saved, if the process saves.
    pub(super) fn act(&mut self) -> Option<v1::Assignment> {
        self.receive();
        if self.connection.is_none() || self.directive.number == 0 {
            return None;
        }
        match self.directive.assignment.clone() {
            Some(assignment) => self.follow(assignment),
            None => {
                (self.held, self.assignment) = (None, None);
                None
            }
        }
    }

    fn receive(&mut self) {
        let Some((_, inbox)) = &mut self.connection else { return };
        while let Ok(message) = inbox.try_recv() {
            if let Some(coordinator_message::Kind::Directive(directive)) = message.unwrap().kind {
                self.directive = *directive;
            }
        }
    }

    fn follow(&mut self, assignment: v1::Assignment) -> Option<v1::Assignment> {
        let same_job = self.held.take_if(|held| held.job_id != assignment.job_id).is_none();
        let generation = self.held.as_ref().map(|held| held.generation);
        self.assignment = Some(assignment.clone());
        if generation != Some(assignment.generation) {
            let kept = self.held.as_ref().filter(|held| same_job && has_state(held.phase()));
            let kept = kept.map(|held| held.completed_steps);
            let stored = assignment.checkpoint.as_ref().map(|checkpoint| checkpoint.step);
            self.held = Some(v1::HeldJob {
                job_id: assignment.job_id,
                generation: assignment.generation,
                completed_steps: kept.max(stored).unwrap_or(0),
                ..v1::HeldJob::default()
            });
            self.enter(if kept.is_some() { Phase::Prepared } else { Phase::Preparing });
            return None;
        }
        match (self.goal(), self.phase()) {
            (_, Some(Phase::Preparing)) => self.enter(Phase::Prepared),
            (Goal::Train, Some(Phase::Prepared)) => self.enter(Phase::Forming),
            (Goal::Save, Some(Phase::Prepared | Phase::Stopped | Phase::Broken | Phase::Finished)) => {
                self.enter(Phase::Saving);
            }
            (Goal::Save, Some(Phase::Saving)) => return Some(assignment),
            _ => {}
        }
        None
    }
}
