//! Decides what a job needs next: a pure function of the job, the reports of its workers, and the
//! clock. The scheduler (`crate::scheduler`) forms groups; everything else about a group is decided
//! here.

use std::collections::BTreeSet;
use std::time::Duration;

use lora_proto::v1::{self, Fault, Phase, job_event};
use lora_spec::{DeviceMemory, JobState};
use tokio::time::Instant;

use super::action::Action;
use super::fault::{Exclusion, WorkerFault, local_fault};
use super::group::{AfterSave, GroupPhase, Regroup};
use super::job::{Job, precedence};
use super::member::{Member, MemberState};
use super::membership::{EvictionReason, MemberReport, decide_membership};
use super::workers::{Worker, Workers, has_state};
use crate::admission::validate::{ValidationOutcome, fits_any};
use crate::config::RecoveryConfig;
use crate::store::MemberRow;

/// The time that the last steps of a finished run may take to arrive. After that, the result is
/// accepted without them.
const LAST_STEPS_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything that a decision depends on, besides the job and its members.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Circumstances<'a> {
    pub(crate) recovery: &'a RecoveryConfig,
    pub(crate) now: Instant,
    /// The highest step in the store; 0 if there is none.
    pub(crate) last_stored_step: u64,
    /// The step of the newest checkpoint in the store; 0 if there is none.
    pub(crate) checkpoint_step: u64,
    /// Whether another job that waits for members comes before this one.
    pub(crate) gives_way: bool,
    /// Whether a worker that is not a member could take the place of one.
    pub(crate) has_substitute: bool,
}

/// Returns the actions that bring the job forward, in order.
pub(crate) fn reconcile(job: &Job, members: &[Member], circumstances: Circumstances) -> Vec<Action> {
    let observed = Observed { job, members, circumstances };
    match job.state() {
        state if !state.is_active() => return Vec::new(),
        JobState::Cancelling => return observed.cancelling(),
        _ => {}
    }
    if let Some(fault) = observed.job_fault() {
        return vec![Action::Fail(fault)];
    }
    let mut actions = observed.new_bases();
    actions.extend(observed.new_notice());
    actions.extend(match job.state() {
        JobState::Preparing | JobState::Recovering => observed.preparing(),
        JobState::Running => observed.running(),
        JobState::Waiting => observed.waiting(),
        JobState::Pausing => observed.pausing(),
        _ => Vec::new(),
    });
    actions
}

/// Returns the action that follows the validation of a job. `available` has the memory of the
/// workers that the job may get; it is empty if they are not known.
pub(crate) fn validated(outcome: &ValidationOutcome, available: &[DeviceMemory]) -> Action {
    let fail = |cause| Action::Fail(v1::Failure { cause, ..v1::Failure::default() });
    match outcome {
        ValidationOutcome::Problem(problem) => fail(problem.clone()),
        ValidationOutcome::Valid { requirements, tokens, notes } => {
            match requirements.as_deref().map_or(Ok(()), |it| fits_any(it, available)) {
                Ok(()) => Action::Queue {
                    requirements: requirements.clone(),
                    tokens: tokens.clone(),
                    notes: notes.clone(),
                },
                Err(error) => fail(error.to_string()),
            }
        }
    }
}

/// Whether another job that waits for members comes before this one. Two such jobs could wait for
/// each other's members forever, so the one that the scheduler serves later releases its own.
pub(crate) fn gives_way<'a>(job: &Job, mut jobs: impl Iterator<Item = &'a Job>) -> bool {
    let precedence = |job: &Job| precedence(job.row.priority, job.row.sequence);
    jobs.any(|other| other.state() == JobState::Waiting && precedence(other) < precedence(job))
}

/// Whether a worker that is not a member of `job` could take the place of one, now or once its own
/// job has ended.
pub(crate) fn has_substitute(job: &Job, workers: &Workers) -> bool {
    let fits = |worker: &Worker| {
        job.row.requirements.as_ref().is_none_or(|needed| needed.fits(worker.memory()).is_ok())
    };
    workers.iter().any(|(name, worker)| {
        let instance_id = &worker.hello.instance_id;
        let is_member = |member: &MemberRow| member.worker == *name && member.instance_id == *instance_id;
        worker.is_connected()
            && !worker.status.draining
            && !job.row.members.iter().any(is_member)
            && !job.excludes(name, instance_id)
            && fits(worker)
    })
}

/// A job with its observed members.
struct Observed<'a> {
    job: &'a Job,
    members: &'a [Member<'a>],
    circumstances: Circumstances<'a>,
}

impl<'a> Observed<'a> {
    /// The fault of the job, if a member reports one: the job itself failed, or the members' bases
    /// differ.
    fn job_fault(&self) -> Option<v1::Failure> {
        let fails_job = |(_, member, held): &(usize, &Member, &v1::HeldJob)| {
            held.phase() == Phase::Failed
                && !self.job.excludes(&member.row.worker, &member.row.instance_id)
                && !self.can_do_without(member, held)
        };
        if let Some((rank, member, held)) = self.in_group().find(fails_job) {
            return Some(v1::Failure {
                worker: Some(member.row.worker.clone()),
                rank: Some(rank as u32),
                completed_steps: held.completed_steps.max(self.job.row.completed_steps),
                cause: held.cause.clone(),
            });
        }
        let mut known = self.job.row.base_sha256.as_str();
        for (member, base) in self.bases() {
            if !known.is_empty() && known != base.sha256 {
                let cause = format!(
                    "model.base: this worker's base has the hash {}, but the job started with {known}; \
                     all workers must have the same files",
                    base.sha256
                );
                let (worker, completed_steps) = (Some(member.worker.clone()), self.job.row.completed_steps);
                return Some(v1::Failure { worker, rank: None, completed_steps, cause });
            }
            known = &base.sha256;
        }
        None
    }

    /// Whether the job may continue without a member that failed: the fault is the worker's, no
    /// other worker has reported the same, and another one can take its place.
    fn can_do_without(&self, failed: &Member, held: &v1::HeldJob) -> bool {
        let Some(fault) = local_fault(held) else { return false };
        let is_other = |worker: &str| worker != failed.row.worker;
        let before = self.job.excluded.iter().map(|excluded| (excluded.worker.as_str(), excluded.fault));
        let now = self
            .in_group()
            .filter_map(|(_, member, held)| Some((member.row.worker.as_str(), local_fault(held)?)));
        if before.chain(now).any(|(worker, reported)| reported == fault && is_other(worker)) {
            return false;
        }
        let remains = |member: &Member| {
            member.stays() && is_other(&member.row.worker) && member.phase() != Some(Phase::Failed)
        };
        self.circumstances.has_substitute || self.members.iter().any(remains)
    }

    /// Whether a member failed without failing the job.
    fn has_failed_member(&self) -> bool {
        self.members.iter().any(|member| member.phase() == Some(Phase::Failed))
    }

    fn new_bases(&self) -> Vec<Action> {
        let record = |(member, base): (&MemberRow, &v1::BaseReady)| Action::RecordBase {
            member: member.clone(),
            base: v1::BaseReady { worker: member.worker.clone(), ..base.clone() },
        };
        let recorded = &self.job.recorded_bases;
        self.bases().filter(|(member, _)| !recorded.contains(member)).map(record).collect()
    }

    /// The bases that the members of this generation report.
    fn bases(&self) -> impl Iterator<Item = (&'a MemberRow, &'a v1::BaseReady)> {
        self.in_group().filter_map(|(_, member, held)| Some((member.row, held.base.as_ref()?)))
    }

    /// The notice of rank 0 about its group, once per generation.
    fn new_notice(&self) -> Option<Action> {
        let (_, member, held) = self.in_group().find(|(rank, ..)| *rank == 0)?;
        if held.notice.is_empty() || self.job.noticed_generation == self.job.row.generation {
            return None;
        }
        let (worker, text) = (member.row.worker.clone(), held.notice.clone());
        Some(Action::RecordNotice(v1::Notice { worker, step: held.completed_steps, text }))
    }

    /// Ends the cancellation once no process holds the job. A disconnected process counts as
    /// holding the job until its lease expires.
    fn cancelling(&self) -> Vec<Action> {
        let is_released = |member: &Member| {
            member.is_lost() || (member.is_connected() && member.is_up_to_date && member.held().is_none())
        };
        if self.members.iter().all(is_released) { vec![Action::Cancel] } else { Vec::new() }
    }

    /// Waits until every member has loaded the job or still has its state, then starts training.
    fn preparing(&self) -> Vec<Action> {
        let timed_out = self.timed_out_ranks();
        if !timed_out.is_empty() || self.members.iter().any(Member::is_lost) || self.has_failed_member() {
            return self.break_group(&timed_out);
        }
        if let Some(leaving) = self.leaving_worker() {
            return self.replace_stopped_group(format!("worker {leaving} leaves"));
        }
        let ready: Vec<&v1::HeldJob> =
            self.in_group().map(|(_, _, held)| held).filter(|held| has_state(held.phase())).collect();
        if ready.len() < self.members.len() {
            return Vec::new();
        }
        let facts = ready.iter().find_map(|held| held.facts);
        let completed_steps = ready.iter().map(|held| held.completed_steps).max().unwrap_or(0);
        vec![Action::Train { facts, completed_steps }]
    }

    fn running(&self) -> Vec<Action> {
        if let Some(actions) = self.result() {
            return actions;
        }
        let timed_out = self.timed_out_ranks();
        if !timed_out.is_empty() {
            return self.break_group(&timed_out);
        }
        // A connected member that does not report this generation has lost its run.
        let is_broken = |member: &Member| {
            matches!(member.state, MemberState::Lost | MemberState::OtherGeneration(_))
                || matches!(member.phase(), Some(Phase::Broken | Phase::Failed))
        };
        if self.members.iter().any(is_broken) {
            let trains = |member: &Member| {
                matches!(member.phase(), Some(Phase::Training | Phase::Forming | Phase::Exporting))
            };
            let may_wait = self.members.iter().any(trains) && !self.is_settled();
            return if may_wait { self.enter(self.broken()) } else { self.break_group(&timed_out) };
        }
        let leaving = || Some(format!("worker {} leaves", self.leaving_worker()?));
        let ended = || Some(self.job.phase.regroup()?.reason.clone());
        let reason = self.job.phase.stop_reason().map(str::to_owned).or_else(ended).or_else(leaving);
        let stopped =
            |member: &Member| matches!(member.phase(), Some(Phase::Stopped | Phase::Saving | Phase::Saved));
        if !self.members.iter().all(stopped) {
            return self.enter(match reason {
                Some(reason) => GroupPhase::Stopping { reason },
                None => GroupPhase::Training,
            });
        }
        self.replace_stopped_group(reason.unwrap_or_else(|| "all members stopped".to_owned()))
    }

    /// Updates a job that has fewer members than it needs. The members keep its state in memory
    /// until others join.
    fn waiting(&self) -> Vec<Action> {
        let gives_way = self.circumstances.gives_way;
        let leaves = |member: &Member| member.is_connected() && (gives_way || member.is_draining);
        // Members that leave may have the only copy of the state: they stay until it is in the
        // store.
        let keep: BTreeSet<&str> =
            self.members.iter().filter(|m| !leaves(m)).map(|m| m.row.worker.as_str()).collect();
        let saving = if keep.len() == self.members.len() { None } else { self.unsaved_holder(&keep) };
        let goes = |member: &Member| member.is_lost() || (saving.is_none() && leaves(member));
        let mut actions = Vec::new();
        if self.members.iter().any(goes) {
            let left = self.members.iter().filter(|m| !goes(m)).map(|m| m.row.clone());
            actions.push(Action::KeepMembers(left.collect()));
        }
        let remaining = self.remaining().filter(|_| !gives_way).cloned().collect();
        let reason = self.job.phase.waiting().map(|regroup| regroup.reason.clone()).unwrap_or_default();
        let regroup = Regroup { reason, remaining, ..Regroup::default() };
        let may_return = self.members.iter().any(|member| matches!(member.state, MemberState::Disconnected));
        let is_state_away = may_return && !self.members.iter().any(|member| member.steps().is_some());
        actions.extend(self.enter(match saving {
            Some(by) => GroupPhase::Saving { by, then: AfterSave::Wait(regroup) },
            None if is_state_away => GroupPhase::Reconnecting(regroup),
            None => GroupPhase::Regrouping(regroup),
        }));
        actions
    }

    fn pausing(&self) -> Vec<Action> {
        if let Some(actions) = self.result() {
            return actions;
        }
        let timed_out = self.timed_out_ranks();
        let is_busy = |(rank, member): (usize, &Member)| match member.state {
            MemberState::Disconnected => true,
            MemberState::InGroup(held) => {
                matches!(held.phase(), Phase::Training | Phase::Forming | Phase::Exporting)
                    && !timed_out.contains(&rank)
            }
            MemberState::Lost | MemberState::OtherGeneration(_) => false,
        };
        let is_broken = |member: &Member| member.is_lost() || member.phase() == Some(Phase::Broken);
        let is_broken = self.members.iter().any(is_broken);
        let is_saving = matches!(self.job.phase, GroupPhase::Saving { .. });
        if self.members.iter().enumerate().any(is_busy) {
            match (is_broken, is_saving || self.is_settled()) {
                (true, true) => {}
                (true, false) => return self.enter(self.broken()),
                (false, _) => return Vec::new(),
            }
        }
        match self.unsaved_holder(&BTreeSet::new()) {
            Some(by) => self.enter(GroupPhase::Saving { by, then: AfterSave::Pause }),
            None => vec![Action::Pause],
        }
    }

    /// Accepts the result if rank 0 has uploaded it. `None` if rank 0 has not finished; the result
    /// may still wait for the last steps.
    fn result(&self) -> Option<Vec<Action>> {
        // Only the member that was rank 0 in its group has files, also if the first members left.
        let (rank, member, held) =
            self.in_group().find(|(.., held)| held.phase() == Phase::Finished && !held.files.is_empty())?;
        let (files, steps) = (held.files.clone(), held.completed_steps);
        let may_wait = member.seconds_in_phase < LAST_STEPS_TIMEOUT.as_secs_f64();
        if self.circumstances.last_stored_step < steps && may_wait {
            return Some(Vec::new());
        }
        let (worker, exported) = (member.row.worker.clone(), held.exported);
        Some(vec![Action::Succeed { worker, rank, files, steps, exported }])
    }

    /// The member that must upload its state, because neither a member in `keep` nor the store has
    /// the newest one. A member that is uploading already is preferred.
    fn unsaved_holder(&self, keep: &BTreeSet<&str>) -> Option<String> {
        let timed_out = self.timed_out_ranks();
        let holders = self.members.iter().enumerate().filter(|(rank, _)| !timed_out.contains(rank));
        let holders: Vec<(u64, &str)> =
            holders.filter_map(|(_, m)| Some((m.steps()?, m.row.worker.as_str()))).collect();
        let newest = holders.iter().map(|(steps, _)| *steps).max()?;
        let kept = holders.iter().filter(|(_, worker)| keep.contains(worker)).map(|(steps, _)| *steps).max();
        if newest <= kept.unwrap_or(0).max(self.circumstances.checkpoint_step) {
            return None;
        }
        let mut newest = holders.iter().filter(|(steps, _)| *steps == newest).map(|(_, worker)| *worker);
        let first = newest.clone().next()?;
        let saving = match &self.job.phase {
            GroupPhase::Saving { by, .. } => newest.find(|worker| worker == by),
            _ => None,
        };
        Some(saving.unwrap_or(first).to_owned())
    }

    /// The action that enters `phase`, if the group is in another one.
    fn enter(&self, phase: GroupPhase) -> Vec<Action> {
        if self.job.phase == phase { Vec::new() } else { vec![Action::Enter(phase)] }
    }

    /// The phase of a group in which something broke: since when it is known to be broken.
    fn broken(&self) -> GroupPhase {
        match &self.job.phase {
            phase @ GroupPhase::Broken { .. } => phase.clone(),
            phase => GroupPhase::Broken {
                since: self.circumstances.now,
                stopping: phase.stop_reason().map(str::to_owned),
            },
        }
    }

    /// Whether the members have had their moment to report what they know about a broken group.
    fn is_settled(&self) -> bool {
        let Circumstances { recovery, now, .. } = self.circumstances;
        matches!(self.job.phase, GroupPhase::Broken { since, .. }
            if now.saturating_duration_since(since) >= recovery.settle())
    }

    /// Replaces a group that does not train by one of the remaining members, as planned. If a
    /// member that leaves has the only copy of the newest state, the state is saved first.
    fn replace_stopped_group(&self, reason: String) -> Vec<Action> {
        let keep = self.remaining().map(|member| member.worker.as_str()).collect();
        if let Some(by) = self.unsaved_holder(&keep) {
            return self.enter(GroupPhase::Saving { by, then: AfterSave::Regroup(reason) });
        }
        let remaining = self.remaining().cloned().collect();
        vec![Action::Enter(GroupPhase::Regrouping(Regroup { reason, remaining, ..Regroup::default() }))]
    }

    /// Replaces a broken group by one of the members that are alive and can reach each other.
    /// `timed_out` are the ranks that exceeded a time limit.
    fn break_group(&self, timed_out: &[usize]) -> Vec<Action> {
        let ranks = |list: &[u32]| list.iter().map(|rank| *rank as usize).collect::<Vec<_>>();
        let report = |(rank, member): (usize, &Member)| MemberReport {
            alive: member.is_connected()
                && !timed_out.contains(&rank)
                && member.phase() != Some(Phase::Failed),
            suspects: member.held().map(|held| ranks(&held.suspects)).unwrap_or_default(),
            unreachable: member.held().map(|held| ranks(&held.unreachable)).unwrap_or_default(),
        };
        let reports: Vec<MemberReport> = self.members.iter().enumerate().map(report).collect();
        let decision = decide_membership(&reports);
        let faults: Vec<WorkerFault> =
            decision.evicted.iter().filter_map(|(rank, reason)| self.worker_fault(*rank, reason)).collect();
        let mut causes: Vec<String> = faults
            .iter()
            .map(|fault| format!("{} (rank {}): {}", fault.worker, fault.rank, fault.cause))
            .collect();
        let mut events: Vec<job_event::Kind> =
            faults.iter().map(|fault| job_event::Kind::WorkerLost(fault.event())).collect();
        for (member, held) in self.members.iter().filter_map(|member| Some((member, member.held()?))) {
            if held.phase() == Phase::Broken {
                causes.push(format!("{} reports: {}", member.row.worker, held.cause));
                if faults.is_empty() {
                    let text = format!("{}: {}", member.row.worker, held.cause);
                    let notice = v1::Notice { worker: String::new(), step: held.completed_steps, text };
                    events.push(job_event::Kind::Notice(notice));
                }
            }
        }
        let remaining =
            decision.keep.iter().filter_map(|rank| Some(self.members.get(*rank)?.row.clone())).collect();
        let reason = causes.into_iter().next().unwrap_or_else(|| "the group broke".to_owned());
        let excluded: Vec<Exclusion> = faults.into_iter().filter_map(|fault| fault.excluded).collect();
        let exclude = (!excluded.is_empty()).then_some(Action::Exclude(excluded));
        let regroup = Regroup { reason, remaining, events, is_failure: true };
        exclude.into_iter().chain([Action::Enter(GroupPhase::Regrouping(regroup))]).collect()
    }

    fn worker_fault(&self, rank: usize, reason: &EvictionReason) -> Option<WorkerFault> {
        let member = self.members.get(rank)?;
        let (cause, excluded) = match (member.state, reason) {
            (_, EvictionReason::Unreachable(peers)) => {
                (format!("this worker and ranks {peers:?} cannot reach each other"), Some(Fault::Unspecified))
            }
            (MemberState::InGroup(held), EvictionReason::Dead) if held.phase() == Phase::Failed => {
                (held.cause.clone(), Some(held.fault()))
            }
            (MemberState::InGroup(held), EvictionReason::Dead) => {
                let (phase, seconds) = (held.phase().name(), member.seconds_in_phase);
                (format!("no progress while {phase} for {seconds:.0} s"), None)
            }
            (_, EvictionReason::Dead) => {
                ("the connection was lost, or no heartbeat came in time".to_owned(), None)
            }
        };
        let MemberRow { worker, instance_id, .. } = member.row;
        let excluded = excluded.map(|fault| Exclusion {
            instance_id: instance_id.clone(),
            worker: worker.clone(),
            fault,
        });
        Some(WorkerFault { worker: worker.clone(), rank, cause, excluded })
    }

    /// The ranks whose phase has exceeded its time limit. A rank that waits for its peers is
    /// included only if every rank waits: a peer that does not wait has its own time limit, which
    /// may end later. A disconnected or lost peer is not known to wait.
    fn timed_out_ranks(&self) -> Vec<usize> {
        let recovery = self.circumstances.recovery;
        let limit = |member: &Member| match member.phase()? {
            Phase::Preparing => Some(recovery.preparing_seconds),
            Phase::Forming => Some(recovery.forming_seconds),
            Phase::Training => Some(recovery.step_seconds),
            Phase::Saving => Some(recovery.saving_seconds),
            Phase::Exporting => Some(recovery.exporting_seconds),
            _ => None,
        };
        let limited = || self.members.iter().enumerate().filter_map(|(rank, m)| Some((rank, m, limit(m)?)));
        let is_absent =
            |member: &Member| matches!(member.state, MemberState::Disconnected | MemberState::Lost);
        let all_wait = limited().all(|(_, m, _)| m.waits_for_peers()) && !self.members.iter().any(is_absent);
        limited()
            .filter(|(_, m, limit)| m.seconds_in_phase > *limit && (all_wait || !m.waits_for_peers()))
            .map(|(rank, ..)| rank)
            .collect()
    }

    /// Rank, member and report of the members that have joined this generation.
    fn in_group(&self) -> impl Iterator<Item = (usize, &'a Member<'a>, &'a v1::HeldJob)> {
        self.members.iter().enumerate().filter_map(|(rank, member)| match member.state {
            MemberState::InGroup(held) => Some((rank, member, held)),
            _ => None,
        })
    }

    /// The members that are connected and not draining.
    fn remaining(&self) -> impl Iterator<Item = &'a MemberRow> {
        self.members.iter().filter(|member| member.stays()).map(|member| member.row)
    }

    /// A worker that is connected and must leave.
    fn leaving_worker(&self) -> Option<&'a str> {
        let leaving = self.members.iter().find(|member| member.is_connected() && member.is_draining);
        leaving.map(|member| member.row.worker.as_str())
    }
}
