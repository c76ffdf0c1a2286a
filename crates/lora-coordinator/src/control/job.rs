//! A job that the service processes: its row in the store, and the state of its group in memory.
//! Nothing here has an effect, and only the time of a change comes from outside; [`super::jobs`]
//! stores the changes.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use lora_proto::v1::{self, Goal, job_event};
use lora_spec::{FieldError, JobSpec, JobState};

use super::action::{Action, NewGroup};
use super::fault::Exclusion;
use super::group::{AfterSave, GroupPhase, Regroup};
use super::member::{enters_training, observe, some_before_training};
use super::workers::Workers;
use crate::store::{JobRow, MemberRow, Recorded};

/// A job that the service processes.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) row: JobRow,
    pub(crate) spec: JobSpec,
    pub(crate) phase: GroupPhase,
    /// The assignment of each member, by worker name.
    assignments: Arc<BTreeMap<String, v1::Assignment>>,
    /// The number of steps that were finished when the group was formed.
    steps_at_start: u64,
    /// Processes that could not reach the others or failed by themselves; the job does not use them
    /// again.
    pub(crate) excluded: Vec<Exclusion>,
    /// Members whose base is recorded as an event.
    pub(crate) recorded_bases: Vec<MemberRow>,
    /// The newest generation whose notice is in the log; 0 if there is none.
    pub(crate) noticed_generation: u64,
}

/// A job after an action, and the events that the store records with it.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) job: Job,
    pub(crate) events: Vec<job_event::Kind>,
}

/// What only the store and a random number generator can say about a new group.
#[derive(Debug, Clone, Default)]
pub(crate) struct GroupMaterial {
    /// The newest checkpoint in the store.
    pub(crate) checkpoint: Option<v1::Checkpoint>,
    /// The secret that the members will share.
    pub(crate) token: String,
}

/// A bug: the table of transitions does not allow this change of a job's state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a job cannot change from {} to {}", from.name(), to.name())]
pub(crate) struct InvalidTransition {
    from: JobState,
    to: JobState,
}

impl Job {
    /// Creates a job from its row, as after a restart. Members continue from `checkpoint` if they
    /// do not have the state in memory. What is `recorded` is not recorded again.
    ///
    /// # Errors
    /// This build cannot read the settings in the row.
    pub(crate) fn new(
        row: JobRow,
        checkpoint: Option<v1::Checkpoint>,
        recorded: &Recorded,
    ) -> Result<Self, FieldError> {
        let phase = match row.state {
            // Whether a pausing job has begun to train follows from the reports of its members.
            JobState::Preparing | JobState::Recovering | JobState::Pausing => GroupPhase::Forming,
            JobState::Running => GroupPhase::Training,
            JobState::Waiting => GroupPhase::Regrouping(Regroup {
                reason: "the coordinator was restarted".to_owned(),
                remaining: row.members.clone(),
                ..Regroup::default()
            }),
            _ => GroupPhase::Absent,
        };
        let has_base = |member: &&MemberRow| recorded.bases.contains(&member.worker);
        let recorded_bases = row.members.iter().filter(has_base).cloned().collect();
        Ok(Self {
            spec: JobSpec::try_from(row.spec.clone())?,
            phase,
            assignments: Arc::new(assignments(&row, checkpoint)),
            steps_at_start: row.completed_steps,
            excluded: Vec::new(),
            recorded_bases,
            noticed_generation: if recorded.has_notice { row.generation } else { 0 },
            row,
        })
    }

    pub(crate) fn state(&self) -> JobState {
        self.row.state
    }

    /// Whether the job does not use this process of a worker again.
    pub(crate) fn excludes(&self, worker: &str, instance_id: &str) -> bool {
        let is_it =
            |excluded: &Exclusion| (&*excluded.worker, &*excluded.instance_id) == (worker, instance_id);
        self.excluded.iter().any(is_it)
    }

    /// Whether the worker is a member of the group.
    pub(crate) fn has_member(&self, worker: &str) -> bool {
        self.row.members.iter().any(|member| member.worker == worker)
    }

    /// The number of groups in a row that finished no step, if the current one ends with `regroup`.
    pub(crate) fn fruitless_after(&self, regroup: &Regroup) -> u32 {
        match regroup.is_failure {
            false => self.row.fruitless,
            true if self.row.completed_steps > self.steps_at_start => 0,
            true => self.row.fruitless + 1,
        }
    }

    /// The desired state of the worker with this name. A process that replaced a member's process
    /// is not a member.
    pub(crate) fn desired_state(&self, worker: &str, workers: &Workers) -> (Option<&v1::Assignment>, Goal) {
        let members = &observe(&self.row, workers);
        let is_member = members.iter().any(|member| member.row.worker == worker && !member.is_lost());
        let is_held = is_member && self.state().is_active() && self.state() != JobState::Cancelling;
        let assignment = self.assignments.get(worker).filter(|_| is_held);
        let Some(assignment) = assignment else { return (None, Goal::Unspecified) };
        let goal = match (self.state(), &self.phase) {
            (_, GroupPhase::Saving { by, .. }) if by == worker => Goal::Save,
            (JobState::Preparing | JobState::Recovering, _) => Goal::Prepare,
            (JobState::Running, phase) if !phase.is_stopping() => Goal::Train,
            // A member that was not sent `Train` would not form the group in which the others stop.
            (JobState::Running, _) if some_before_training(members) => Goal::Train,
            (JobState::Pausing, phase) if phase.is_stopping() && some_before_training(members) => Goal::Train,
            (JobState::Pausing, _) if enters_training(members) => Goal::Train,
            _ => Goal::Stop,
        };
        (Some(assignment), goal)
    }

    /// The job after `action`, with the events to record. The events of a change of state come
    /// last. `group` is needed for [`Action::Form`].
    ///
    /// # Errors
    /// The table of transitions does not allow the change.
    pub(crate) fn changed(&self, action: Action, group: GroupMaterial) -> Result<Change, InvalidTransition> {
        let mut next = Change { job: self.clone(), events: Vec::new() };
        let job = &mut next.job;
        match action {
            Action::Queue { requirements, tokens, notes } => {
                let step = job.row.completed_steps;
                let notice = |text| job_event::Kind::Notice(v1::Notice { worker: String::new(), step, text });
                // A job that is resumed is validated again, with the same data.
                let is_new = job.row.generation == 0;
                next.events.extend(notes.into_iter().filter(|_| is_new).map(notice));
                job.row.inputs.tokens.extend(tokens);
                job.row.validated = true;
                job.row.requirements = requirements.map(|requirements| *requirements);
                next.enter(JobState::Queued)?;
            }
            Action::Resume { spec, message, is_valid } => {
                job.spec = *spec;
                job.row.spec = *message;
                job.row.validated = is_valid;
                job.row.fruitless = 0;
                job.excluded.clear();
                next.enter(if is_valid { JobState::Queued } else { JobState::Validating })?;
            }
            Action::StartPause => {
                job.phase = match std::mem::replace(&mut job.phase, GroupPhase::Forming) {
                    GroupPhase::Saving { by, .. } => GroupPhase::Saving { by, then: AfterSave::Pause },
                    phase @ (GroupPhase::Forming | GroupPhase::Broken { .. }) => phase,
                    _ => GroupPhase::Stopping { reason: String::new() },
                };
                next.enter(JobState::Pausing)?;
            }
            Action::Pause => next.enter(JobState::Paused)?,
            Action::StartCancel => next.enter(JobState::Cancelling)?,
            Action::Cancel => next.enter(JobState::Cancelled)?,
            Action::Fail(failure) => {
                job.row.failure = Some(failure);
                next.enter(JobState::Failed)?;
            }
            Action::Succeed { steps, exported, .. } => {
                job.row.exported = exported;
                job.row.completed_steps = job.row.completed_steps.max(steps);
                next.enter(JobState::Succeeded)?;
            }
            Action::Train { facts, completed_steps } => {
                job.row.facts = facts.or(job.row.facts);
                job.row.completed_steps = job.row.completed_steps.max(completed_steps);
                job.phase = GroupPhase::Training;
                let prepared = v1::RunPrepared { facts, completed_steps };
                next.events.push(job_event::Kind::Prepared(prepared));
                next.enter(JobState::Running)?;
            }
            Action::Enter(phase) => job.phase = phase,
            Action::Exclude(processes) => {
                let new = processes.into_iter().filter(|new| !job.excludes(&new.worker, &new.instance_id));
                let new: Vec<Exclusion> = new.collect();
                job.excluded.extend(new);
            }
            Action::KeepMembers(members) => job.row.members = members,
            Action::Form(new) => next.form(new, group)?,
            Action::Wait { regroup, fruitless } => {
                let Regroup { reason, remaining, events, .. } = regroup;
                job.row.members.clone_from(&remaining);
                job.row.fruitless = fruitless;
                job.phase = GroupPhase::Regrouping(Regroup { reason, remaining, ..Regroup::default() });
                next.events = events;
                next.enter(JobState::Waiting)?;
            }
            Action::ExplainWait(reason) => job.row.waiting_for = reason,
            Action::RecordBase { member, base } => {
                job.row.base_sha256.clone_from(&base.sha256);
                job.recorded_bases.push(member);
                next.events.push(job_event::Kind::BaseReady(base));
            }
            Action::RecordNotice(notice) => {
                job.noticed_generation = job.row.generation;
                next.events.push(job_event::Kind::Notice(notice));
            }
            Action::AddSteps(steps) => {
                let newest = steps.iter().filter_map(|step| Some(step.metrics?.step)).max().unwrap_or(0);
                job.row.completed_steps = job.row.completed_steps.max(newest);
            }
        }
        Ok(next)
    }
}

impl GroupPhase {
    /// Whether the members must stop at a step boundary.
    fn is_stopping(&self) -> bool {
        match self {
            Self::Stopping { .. } | Self::Saving { .. } | Self::Regrouping(_) | Self::Reconnecting(_) => true,
            Self::Broken { stopping, .. } => stopping.is_some(),
            Self::Absent | Self::Forming | Self::Training => false,
        }
    }
}

impl Change {
    /// Changes the state of the job, resets what does not apply to the new state, and adds the
    /// event.
    fn enter(&mut self, state: JobState) -> Result<(), InvalidTransition> {
        let row = &mut self.job.row;
        if !row.state.can_become(state) {
            return Err(InvalidTransition { from: row.state, to: state });
        }
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
        self.events.push(state_changed(row));
        Ok(())
    }

    fn form(&mut self, new: NewGroup, group: GroupMaterial) -> Result<(), InvalidTransition> {
        let NewGroup { members, newest_in_memory, reason, events, fruitless } = new;
        let checkpoint = group
            .checkpoint
            .filter(|stored| newest_in_memory.is_none_or(|in_memory| in_memory < stored.step));
        let row = &mut self.job.row;
        row.generation += 1;
        row.members = members;
        row.token = group.token;
        row.fruitless = fruitless;
        self.events = events;
        self.events.push(job_event::Kind::Assigned(v1::Assigned {
            generation: row.generation,
            workers: row.members.iter().map(|member| member.worker.clone()).collect(),
            checkpoint_step: checkpoint.as_ref().map(|checkpoint| checkpoint.step),
            reason,
        }));
        let queued = row.state == JobState::Queued;
        self.enter(if queued { JobState::Preparing } else { JobState::Recovering })?;
        let job = &mut self.job;
        job.assignments = Arc::new(assignments(&job.row, checkpoint));
        job.phase = GroupPhase::Forming;
        job.steps_at_start = job.row.completed_steps;
        Ok(())
    }
}

/// The members' assignments, by worker name. Rank 0 continues from `checkpoint`.
fn assignments(row: &JobRow, checkpoint: Option<v1::Checkpoint>) -> BTreeMap<String, v1::Assignment> {
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
    row.members.iter().enumerate().map(assign).collect()
}

/// The order of jobs: higher priorities first, then older jobs. A smaller value comes first.
pub(crate) fn precedence(priority: i32, sequence: i64) -> impl Ord {
    (Reverse(priority), sequence)
}

/// The event for the change to a row's current state.
pub(crate) fn state_changed(row: &JobRow) -> job_event::Kind {
    let change = v1::StateChanged { state: row.state.name().to_owned(), failure: row.failure.clone() };
    job_event::Kind::StateChanged(change)
}
