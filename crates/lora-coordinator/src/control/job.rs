//! A job that is neither paused nor ended: its row in the store, and the state of its group in
//! memory.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use lora_proto::v1::{self, Goal, Phase, job_event};
use lora_spec::{FieldError, JobSpec, JobState};
use tokio::time::Instant;

use crate::control::reconcile::PendingGroup;
use crate::control::workers::{Worker, Workers, has_state};
use crate::store::{JobRow, MemberRow, Store, StoreError};

/// A job that the service processes.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) row: JobRow,
    pub(crate) spec: JobSpec,
    /// The assignment of each member, by worker name.
    pub(crate) assignments: BTreeMap<String, v1::Assignment>,
    /// The group that must replace the current one, if there is one.
    pub(crate) pending_group: Option<PendingGroup>,
    /// The reason why the members must stop at a step boundary, so that the group can change;
    /// `None` if they need not.
    pub(crate) planned_change: Option<String>,
    /// Whether the members were sent the goal `Train`.
    pub(crate) training_started: bool,
    /// Whether every member has entered training, so that all can stop in the same group.
    pub(crate) all_members_training: bool,
    /// The member that must upload its state to the store.
    pub(crate) saving_member: Option<String>,
    /// The time when the group was first seen to be broken.
    pub(crate) broken_since: Option<Instant>,
    /// The number of steps that were finished when the group was formed.
    pub(crate) steps_at_start: u64,
    /// Instance ids of processes that could not reach the others; the job does not use them again.
    pub(crate) excluded: BTreeSet<String>,
    /// Members whose base is recorded as an event.
    pub(crate) recorded_bases: Vec<MemberRow>,
    /// The newest generation whose notice is in the log; 0 if there is none.
    pub(crate) noticed_generation: u64,
}

/// The observed state of a member of the group.
#[derive(Debug)]
pub(crate) enum MemberState<'a> {
    /// The process is lost.
    Lost,
    /// The process is disconnected, but may still train.
    Disconnected,
    /// The process has not joined this generation yet. Contains the job that it reports from an
    /// older generation, if any.
    OtherGeneration(Option<&'a v1::HeldJob>),
    /// The process has joined this generation.
    InGroup(&'a v1::HeldJob),
}

impl<'a> MemberState<'a> {
    /// The job as the member reports it, in any generation.
    pub(crate) fn held(&self) -> Option<&'a v1::HeldJob> {
        match self {
            Self::InGroup(held) => Some(held),
            Self::OtherGeneration(held) => *held,
            Self::Lost | Self::Disconnected => None,
        }
    }

    /// The phase of the member in this generation.
    pub(crate) fn phase(&self) -> Option<Phase> {
        match self {
            Self::InGroup(held) => Some(held.phase()),
            _ => None,
        }
    }

    /// The completed steps of the state that the member has in memory.
    pub(crate) fn steps(&self) -> Option<u64> {
        self.held().filter(|held| has_state(held.phase())).map(|held| held.completed_steps)
    }
}

impl Job {
    /// Creates a job from its row.
    ///
    /// # Errors
    /// This build cannot read the settings in the row.
    pub(crate) fn new(row: JobRow) -> Result<Self, FieldError> {
        Ok(Self {
            spec: JobSpec::try_from(row.spec.clone())?,
            assignments: BTreeMap::new(),
            pending_group: None,
            planned_change: None,
            training_started: row.state == JobState::Running,
            all_members_training: false,
            saving_member: None,
            broken_since: None,
            steps_at_start: row.completed_steps,
            excluded: BTreeSet::new(),
            recorded_bases: Vec::new(),
            noticed_generation: 0,
            row,
        })
    }

    pub(crate) fn state(&self) -> JobState {
        self.row.state
    }

    /// Changes the row, first in the store, together with `events`, and then in memory.
    pub(crate) async fn update(
        &mut self,
        store: &Store,
        events: Vec<job_event::Kind>,
        change: impl FnOnce(&mut JobRow),
    ) -> Result<(), StoreError> {
        let mut next = self.row.clone();
        change(&mut next);
        store.save_job(&next, events).await?;
        self.row = next;
        Ok(())
    }

    /// Changes the state of the job, together with other changes of the row. `events` come before
    /// the event of the state. If the table of transitions does not allow `state`, which is a bug,
    /// logs an error and changes nothing.
    pub(crate) async fn transition_to(
        &mut self,
        store: &Store,
        state: JobState,
        mut events: Vec<job_event::Kind>,
        change: impl FnOnce(&mut JobRow),
    ) -> Result<(), StoreError> {
        if !self.row.state.can_become(state) {
            tracing::error!(
                job = self.row.id,
                from = self.row.state.name(),
                to = state.name(),
                "invalid state transition"
            );
            return Ok(());
        }
        let mut next = self.row.clone();
        set_state(&mut next, state);
        change(&mut next);
        events.push(state_changed(&next));
        store.save_job(&next, events).await?;
        self.row = next;
        tracing::info!(
            job = self.row.id,
            state = state.name(),
            generation = self.row.generation,
            "job changed state"
        );
        Ok(())
    }

    /// The observed state of each member, by rank.
    pub(crate) fn members<'a>(&self, workers: &'a Workers) -> Vec<MemberState<'a>> {
        self.row.members.iter().map(|member| self.member(member, workers)).collect()
    }

    fn member<'a>(&self, member: &MemberRow, workers: &'a Workers) -> MemberState<'a> {
        let Some(worker) = member_process(member, workers) else { return MemberState::Lost };
        if !worker.is_connected() {
            return MemberState::Disconnected;
        }
        match worker.held().filter(|held| held.job_id == self.row.id) {
            Some(held) if held.generation == self.row.generation => MemberState::InGroup(held),
            held => MemberState::OtherGeneration(held),
        }
    }

    /// The desired state of the worker with this name.
    pub(crate) fn desired_state(&self, worker: &str) -> (Option<&v1::Assignment>, Goal) {
        let assignment = self.assignments.get(worker).filter(|_| self.is_assigned());
        let Some(assignment) = assignment else { return (None, Goal::Unspecified) };
        let goal = match self.state() {
            _ if self.saving_member.as_deref() == Some(worker) => Goal::Save,
            JobState::Preparing | JobState::Recovering => Goal::Prepare,
            JobState::Running if self.planned_change.is_none() => Goal::Train,
            // A member that was not sent `Train` would not form the group in which the others stop.
            JobState::Running | JobState::Pausing if self.training_started && !self.all_members_training => {
                Goal::Train
            }
            _ => Goal::Stop,
        };
        (Some(assignment), goal)
    }

    /// Whether workers must hold the job.
    fn is_assigned(&self) -> bool {
        self.state().is_active() && self.state() != JobState::Cancelling
    }

    /// Whether the worker is a member of the group.
    pub(crate) fn has_member(&self, worker: &str) -> bool {
        self.row.members.iter().any(|member| member.worker == worker)
    }

    /// Derives the members' assignments from the row. Rank 0 continues from `checkpoint`.
    pub(crate) fn assign(&mut self, checkpoint: Option<v1::Checkpoint>) {
        let row = &self.row;
        let peers: Vec<String> = row.members.iter().map(|member| member.peer_address.clone()).collect();
        let assign = |(rank, member): (usize, &MemberRow)| {
            let assignment = v1::Assignment {
                job_id: row.id.clone(),
                generation: row.generation,
                job: Some(row.spec.clone()),
                inputs: Some(row.inputs.clone()),
                rank: rank as u32,
                peers: peers.clone(),
                token: row.token.clone(),
                checkpoint: checkpoint.clone().filter(|_| rank == 0),
            };
            (member.worker.clone(), assignment)
        };
        self.assignments = row.members.iter().enumerate().map(assign).collect();
    }
}

/// The worker process of a member, if it is not lost.
pub(crate) fn member_process<'a>(member: &MemberRow, workers: &'a Workers) -> Option<&'a Worker> {
    workers.get(&member.worker).filter(|worker| worker.hello.instance_id == member.instance_id)
}

/// Sets the state of a row, and resets the fields that do not apply to the new state.
pub(crate) fn set_state(row: &mut JobRow, state: JobState) {
    row.state = state;
    row.changed = SystemTime::now();
    row.waiting_for.clear();
    if state != JobState::Failed {
        row.failure = None;
    }
    if state.is_stopped() {
        row.members.clear();
        row.token.clear();
    }
}

/// The event for the change to a row's current state.
pub(crate) fn state_changed(row: &JobRow) -> job_event::Kind {
    let change = v1::StateChanged { state: row.state.name().to_owned(), failure: row.failure.clone() };
    job_event::Kind::StateChanged(change)
}
