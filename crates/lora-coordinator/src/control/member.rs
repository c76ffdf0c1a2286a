//! The members of a job's group, as their workers report them.

use lora_proto::v1::{self, Phase};

use super::workers::{Worker, Workers, has_state};
use crate::store::{JobRow, MemberRow};

/// A member and its observed state.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Member<'a> {
    pub(crate) row: &'a MemberRow,
    pub(crate) state: MemberState<'a>,
    /// Whether the worker must leave its job.
    pub(crate) is_draining: bool,
    /// Whether the worker's status takes its last directive into account.
    pub(crate) is_up_to_date: bool,
    /// Seconds since the member entered its phase.
    pub(crate) seconds_in_phase: f64,
}

/// The observed state of a member of the group.
#[derive(Debug, Clone, Copy)]
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

/// The observed members of the group of `job`, by rank.
pub(crate) fn observe<'a>(job: &'a JobRow, workers: &'a Workers) -> Vec<Member<'a>> {
    let member = |row: &'a MemberRow| {
        let worker = member_process(row, workers);
        Member {
            row,
            state: worker.map_or(MemberState::Lost, |worker| state_of(worker, job)),
            is_draining: worker.is_some_and(|worker| worker.status.draining),
            is_up_to_date: worker.is_some_and(Worker::is_up_to_date),
            seconds_in_phase: worker.map_or(0.0, Worker::seconds_in_phase),
        }
    };
    job.members.iter().map(member).collect()
}

fn state_of<'a>(worker: &'a Worker, job: &JobRow) -> MemberState<'a> {
    if !worker.is_connected() {
        return MemberState::Disconnected;
    }
    match worker.held().filter(|held| held.job_id == job.id) {
        Some(held) if held.generation == job.generation => MemberState::InGroup(held),
        held => MemberState::OtherGeneration(held),
    }
}

/// The worker process of a member, if it is not lost.
pub(crate) fn member_process<'a>(member: &MemberRow, workers: &'a Workers) -> Option<&'a Worker> {
    workers.get(&member.worker).filter(|worker| worker.hello.instance_id == member.instance_id)
}

impl<'a> Member<'a> {
    /// The job as the member reports it, in any generation.
    pub(crate) fn held(&self) -> Option<&'a v1::HeldJob> {
        match self.state {
            MemberState::InGroup(held) => Some(held),
            MemberState::OtherGeneration(held) => held,
            MemberState::Lost | MemberState::Disconnected => None,
        }
    }

    /// The phase of the member in this generation.
    pub(crate) fn phase(&self) -> Option<Phase> {
        match self.state {
            MemberState::InGroup(held) => Some(held.phase()),
            _ => None,
        }
    }

    /// The completed steps of the state that the member has in memory.
    pub(crate) fn steps(&self) -> Option<u64> {
        self.held().filter(|held| has_state(held.phase())).map(|held| held.completed_steps)
    }

    pub(crate) fn is_lost(&self) -> bool {
        matches!(self.state, MemberState::Lost)
    }

    pub(crate) fn is_connected(&self) -> bool {
        !matches!(self.state, MemberState::Lost | MemberState::Disconnected)
    }

    /// Whether the member can be part of the next group.
    pub(crate) fn stays(&self) -> bool {
        self.is_connected() && !self.is_draining
    }

    /// Whether the member waits for another rank.
    pub(crate) fn waits_for_peers(&self) -> bool {
        matches!(self.state, MemberState::InGroup(held) if held.waiting_for_peers)
    }
}

/// Whether a member has not entered training in this generation yet.
fn is_before_training(member: &Member) -> bool {
    matches!(member.phase(), Some(Phase::Preparing | Phase::Prepared | Phase::Forming))
}

/// Whether some members have entered training in this generation, and others have not. Those that
/// have not must follow, because the others cannot stop without them.
pub(crate) fn enters_training(members: &[Member]) -> bool {
    let was_told = |member: &Member| {
        member.phase().is_some_and(|phase| {
            !matches!(phase, Phase::Unspecified | Phase::Preparing | Phase::Prepared | Phase::Failed)
        })
    };
    members.iter().any(was_told) && members.iter().any(is_before_training)
}

/// Whether a member must still enter training.
pub(crate) fn some_before_training(members: &[Member]) -> bool {
    members.iter().any(is_before_training)
}
