//! One job that is not at rest: its row in the store, and what is known of its group besides.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use lora_proto::v1::{self, Goal, Phase, job_event};
use lora_spec::{FieldError, JobSpec, JobState};
use tokio::time::Instant;

use crate::reconcile::PendingGroup;
use crate::store::{JobRow, MemberRow, Store, StoreError};
use crate::workers::{Worker, Workers, has_state};

/// A job that the service works on.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) row: JobRow,
    pub(crate) spec: JobSpec,
    /// What each member was told of its place, by worker.
    pub(crate) assignments: BTreeMap<String, v1::Assignment>,
    /// The group must be formed anew, of the members that are left and others; why.
    pub(crate) pending_group: Option<PendingGroup>,
    /// The members shall stop at a step boundary, so that the group can change; why.
    pub(crate) planned_change: Option<String>,
    /// The group was told to train.
    pub(crate) training_started: bool,
    /// Every member has taken that in, so that a stop finds them all in the same group.
    pub(crate) all_members_training: bool,
    /// The member that shall bring its state into the store.
    pub(crate) saving_member: Option<String>,
    /// When the first member was seen to have left the group.
    pub(crate) broken_since: Option<Instant>,
    /// Steps that were finished when the group was formed.
    pub(crate) steps_at_start: u64,
    /// Processes that could not reach the others: the job does without them.
    pub(crate) excluded: BTreeSet<String>,
    /// Processes whose base has been put on record.
    pub(crate) recorded_bases: Vec<MemberRow>,
    /// The newest generation whose notice is in the log; 0: none.
    pub(crate) noticed_generation: u64,
}

/// What a member of the group is known to do.
#[derive(Debug)]
pub(crate) enum MemberState<'a> {
    /// The process is gone for good.
    Lost,
    /// Its connection is broken; it may train on.
    Disconnected,
    /// It has not taken its place in this generation yet. What it holds of the job from an older one, if anything.
    OtherGeneration(Option<&'a v1::HeldJob>),
    /// It has its place in this generation.
    InGroup(&'a v1::HeldJob),
}

impl<'a> MemberState<'a> {
    /// What it holds of the job.
    pub(crate) fn held(&self) -> Option<&'a v1::HeldJob> {
        match self {
            Self::InGroup(held) => Some(held),
            Self::OtherGeneration(held) => *held,
            Self::Lost | Self::Disconnected => None,
        }
    }

    /// Its phase in this generation.
    pub(crate) fn phase(&self) -> Option<Phase> {
        match self {
            Self::InGroup(held) => Some(held.phase()),
            _ => None,
        }
    }

    /// Steps of the state it holds.
    pub(crate) fn steps(&self) -> Option<u64> {
        self.held().filter(|held| has_state(held.phase())).map(|held| held.completed_steps)
    }
}

impl Job {
    /// A job out of the store.
    ///
    /// # Errors
    /// A row whose settings this build does not understand.
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

    /// Changes the row, in the store first, together with `events`.
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

    /// Moves on to `state` together with other changes of the row; `events` come before that of the state. Does nothing, and
    /// says so in the log, if the table of transitions has it otherwise: that is a bug.
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
                "no such transition"
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

    /// What each member does, by rank.
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

    /// What the worker of this name shall hold and do.
    pub(crate) fn desired_state(&self, worker: &str) -> (Option<&v1::Assignment>, Goal) {
        let assignment = self.assignments.get(worker).filter(|_| self.is_assigned());
        let Some(assignment) = assignment else { return (None, Goal::Unspecified) };
        let goal = match self.state() {
            _ if self.saving_member.as_deref() == Some(worker) => Goal::Save,
            JobState::Preparing | JobState::Recovering => Goal::Prepare,
            JobState::Running if self.planned_change.is_none() => Goal::Train,
            // One that never heard of the start would not come to the group in which the others stop.
            JobState::Running | JobState::Pausing if self.training_started && !self.all_members_training => {
                Goal::Train
            }
            _ => Goal::Stop,
        };
        (Some(assignment), goal)
    }

    /// Whether workers shall hold it.
    fn is_assigned(&self) -> bool {
        self.state().is_active() && self.state() != JobState::Cancelling
    }

    /// Whether the worker is a member.
    pub(crate) fn has_member(&self, worker: &str) -> bool {
        self.row.members.iter().any(|member| member.worker == worker)
    }

    /// Makes the members' places out of the row. `checkpoint`: for rank 0 to go on from.
    pub(crate) fn assign(&mut self, checkpoint: Option<v1::Checkpoint>) {
        let row = &self.row;
        let peers: Vec<String> = row.members.iter().map(|member| member.peer_address.clone()).collect();
        let place = |(rank, member): (usize, &MemberRow)| {
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
        self.assignments = row.members.iter().enumerate().map(place).collect();
    }
}

/// The process that a member is, if it is not lost.
pub(crate) fn member_process<'a>(member: &MemberRow, workers: &'a Workers) -> Option<&'a Worker> {
    workers.get(&member.worker).filter(|worker| worker.hello.instance_id == member.instance_id)
}

/// Puts a row into a state.
pub(crate) fn set_state(row: &mut JobRow, state: JobState) {
    row.state = state;
    row.changed = SystemTime::now();
    row.waiting_for.clear();
    if state != JobState::Failed {
        row.failure = None;
    }
    if state.is_at_rest() {
        row.members.clear();
        row.token.clear();
    }
}

/// The event of a row's state.
pub(crate) fn state_changed(row: &JobRow) -> job_event::Kind {
    let change = v1::StateChanged { state: row.state.name().to_owned(), failure: row.failure.clone() };
    job_event::Kind::StateChanged(change)
}
