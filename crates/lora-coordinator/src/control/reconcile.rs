//! Reconciles a job with the state that its workers report.

use std::collections::BTreeSet;
use std::time::Duration;

use lora_proto::v1::{self, Phase, job_event};
use lora_spec::JobState;
use tokio::time::Instant;

use crate::control::job::{Job, MemberState, member_process};
use crate::control::membership::{EvictionReason, MemberReport, decide_membership};
use crate::control::service::Service;
use crate::control::workers::{has_state, phase_name};
use crate::scheduler::placement::precedence;
use crate::store::{JobRow, MemberRow, StoreError};

/// The time that the last steps of a finished run may take to arrive. After that, the result is
/// accepted without them.
const LAST_STEPS_TIMEOUT: Duration = Duration::from_secs(10);

/// The group that replaces a group which broke or changes.
#[derive(Debug, Clone)]
pub(crate) struct PendingGroup {
    /// The reason, as text for users.
    pub(crate) reason: String,
    /// The members that stay.
    pub(crate) remaining: Vec<MemberRow>,
    /// The events to record with the new group.
    pub(crate) events: Vec<job_event::Kind>,
    /// Whether the current group broke; `false` if the change was planned.
    pub(crate) is_failure: bool,
}

impl PendingGroup {
    /// The pending group of a job that waited for workers when the coordinator ended.
    pub(crate) fn resumed(job: &Job) -> Self {
        let reason = "the coordinator was restarted".to_owned();
        Self { reason, remaining: job.row.members.clone(), events: Vec::new(), is_failure: false }
    }
}

impl Service {
    /// Advances a job as far as the states of its workers allow.
    pub(crate) async fn reconcile(&mut self, job: &mut Job) -> Result<(), StoreError> {
        match job.state() {
            state if !state.is_active() => return Ok(()),
            JobState::Cancelling => return self.cancelling(job).await,
            _ => {}
        }
        if let Some(failure) = self.failure(job) {
            return self.fail(job, failure).await;
        }
        self.record_bases(job).await?;
        self.record_notice(job).await?;
        let is_before_training = |member: &MemberState| {
            matches!(member.phase(), Some(Phase::Preparing | Phase::Prepared | Phase::Forming))
        };
        job.all_members_training = !job.members(&self.workers).iter().any(is_before_training);
        match job.state() {
            JobState::Preparing | JobState::Recovering => self.preparing(job).await,
            JobState::Running => self.running(job).await,
            JobState::Waiting => self.waiting(job).await,
            JobState::Pausing => self.pausing(job).await,
            _ => Ok(()),
        }
    }

    /// Fails the job. Its workers are then sent an empty desired state.
    pub(crate) async fn fail(&self, job: &mut Job, failure: v1::Failure) -> Result<(), StoreError> {
        tracing::warn!(job = job.row.id, cause = failure.cause, "job failed");
        job.transition_to(&self.store, JobState::Failed, Vec::new(), |row| row.failure = Some(failure)).await
    }

    /// Ends the cancellation once no process holds the job. A disconnected process counts as
    /// holding the job until its lease expires.
    async fn cancelling(&self, job: &mut Job) -> Result<(), StoreError> {
        let mut processes = job.row.members.iter().filter_map(|member| member_process(member, &self.workers));
        let holds = |held: &v1::HeldJob| held.job_id == job.row.id;
        if processes.any(|worker| {
            !worker.is_connected() || !worker.is_up_to_date() || worker.held().is_some_and(holds)
        }) {
            return Ok(());
        }
        job.transition_to(&self.store, JobState::Cancelled, Vec::new(), |_| ()).await
    }

    /// The failure that a member reports, if the job itself caused it and not the group.
    fn failure(&self, job: &Job) -> Option<v1::Failure> {
        job.members(&self.workers).iter().enumerate().find_map(|(rank, member)| match member {
            MemberState::InGroup(held) if held.phase() == Phase::Failed => Some(v1::Failure {
                worker: Some(job.row.members.get(rank)?.worker.clone()),
                rank: Some(rank as u32),
                completed_steps: held.completed_steps.max(job.row.completed_steps),
                cause: held.cause.clone(),
            }),
            _ => None,
        })
    }

    /// Records that members have loaded the base. Fails the job if the members' bases differ.
    async fn record_bases(&self, job: &mut Job) -> Result<(), StoreError> {
        let mut found = Vec::new();
        for (row, member) in job.row.members.iter().zip(job.members(&self.workers)) {
            if let MemberState::InGroup(v1::HeldJob { base: Some(base), .. }) = member
                && !job.recorded_bases.contains(row)
            {
                found.push((row.clone(), v1::BaseReady { worker: row.worker.clone(), ..base.clone() }));
            }
        }
        for (member, base) in found {
            let known = job.row.base_sha256.clone();
            if !known.is_empty() && known != base.sha256 {
                let cause = format!(
                    "model.base: this worker's base has the hash {}, but the job started with {known}; \
                     all workers must have the same files",
                    base.sha256
                );
                let (worker, completed_steps) = (Some(base.worker), job.row.completed_steps);
                return self.fail(job, v1::Failure { worker, rank: None, completed_steps, cause }).await;
            }
            let sha256 = base.sha256.clone();
            job.update(&self.store, vec![job_event::Kind::BaseReady(base)], |row| row.base_sha256 = sha256)
                .await?;
            job.recorded_bases.push(member);
        }
        Ok(())
    }

    /// Records the notice of rank 0 about its group, once per generation.
    async fn record_notice(&self, job: &mut Job) -> Result<(), StoreError> {
        let generation = job.row.generation;
        let members = job.members(&self.workers);
        let (Some(row), Some(MemberState::InGroup(held))) = (job.row.members.first(), members.first()) else {
            return Ok(());
        };
        if held.notice.is_empty() || job.noticed_generation == generation {
            return Ok(());
        }
        let notice =
            v1::Notice { worker: row.worker.clone(), step: held.completed_steps, text: held.notice.clone() };
        // The notice may have been recorded before a restart of the coordinator.
        if !self.store.has_notice(&job.row.id, generation, &notice.text).await? {
            job.update(&self.store, vec![job_event::Kind::Notice(notice)], |_| ()).await?;
        }
        job.noticed_generation = generation;
        Ok(())
    }

    /// Waits until every member has loaded the job or still has its state, then starts training.
    async fn preparing(&mut self, job: &mut Job) -> Result<(), StoreError> {
        let members = job.members(&self.workers);
        let timed_out = self.timed_out_ranks(job, &members);
        if !timed_out.is_empty() || members.iter().any(|member| matches!(member, MemberState::Lost)) {
            self.break_group(job, &timed_out);
            return Ok(());
        }
        if let Some(leaving) = self.draining_member(job) {
            self.replace_group(job, format!("worker {leaving} leaves"));
            return Ok(());
        }
        let mut helds = members.iter().map(|member| match member {
            MemberState::InGroup(held) if has_state(held.phase()) => Some(*held),
            _ => None,
        });
        let Some(helds) = helds.by_ref().collect::<Option<Vec<_>>>() else { return Ok(()) };
        let facts = helds.iter().find_map(|held| held.facts);
        let completed_steps = helds.iter().map(|held| held.completed_steps).max().unwrap_or(0);
        let prepared = v1::RunPrepared { facts, completed_steps };
        let change = |row: &mut JobRow| {
            row.facts = facts.or(row.facts);
            row.completed_steps = row.completed_steps.max(completed_steps);
        };
        job.transition_to(&self.store, JobState::Running, vec![job_event::Kind::Prepared(prepared)], change)
            .await?;
        job.training_started = true;
        job.all_members_training = false;
        Ok(())
    }

    async fn running(&mut self, job: &mut Job) -> Result<(), StoreError> {
        if self.accept_result(job).await? {
            return Ok(());
        }
        let members = job.members(&self.workers);
        // A connected member that does not report this generation has lost its run.
        let is_gone =
            |member: &MemberState| matches!(member, MemberState::Lost | MemberState::OtherGeneration(_));
        let timed_out = self.timed_out_ranks(job, &members);
        let broken = |member: &MemberState| is_gone(member) || member.phase() == Some(Phase::Broken);
        if !timed_out.is_empty() {
            self.break_group(job, &timed_out);
            return Ok(());
        }
        if members.iter().any(broken) {
            let since = *job.broken_since.get_or_insert_with(Instant::now);
            let trains = |member: &MemberState| {
                matches!(member.phase(), Some(Phase::Training | Phase::Forming | Phase::Exporting))
            };
            if !members.iter().any(trains) || since.elapsed() >= self.config.recovery.settle() {
                self.break_group(job, &timed_out);
            }
            return Ok(());
        }
        if let Some(leaving) = self.draining_member(job) {
            job.planned_change.get_or_insert_with(|| format!("worker {leaving} leaves"));
        }
        let stopped = |member: &MemberState| {
            matches!(member.phase(), Some(Phase::Stopped | Phase::Saving | Phase::Saved))
        };
        if members.iter().all(stopped) {
            let keep: BTreeSet<String> =
                self.remaining_members(job).into_iter().map(|member| member.worker).collect();
            if self.state_is_safe(job, &keep).await? {
                let reason = job.planned_change.clone().unwrap_or_else(|| "all members stopped".to_owned());
                self.replace_group(job, reason);
            }
        }
        Ok(())
    }

    /// Updates a job that has fewer members than it needs. The members keep its state in memory
    /// until others join.
    async fn waiting(&mut self, job: &mut Job) -> Result<(), StoreError> {
        let worker_of = |member: &MemberRow| member_process(member, &self.workers);
        let is_lost = |member: &MemberRow| worker_of(member).is_none();
        // Two such jobs could wait for each other's members forever: the one that the scheduler
        // serves later releases its own.
        let precedence = |row: &JobRow| precedence(row.priority, row.sequence);
        let releases_members = self
            .jobs
            .values()
            .any(|other| other.state() == JobState::Waiting && precedence(&other.row) < precedence(&job.row));
        let leaves = |member: &MemberRow| {
            worker_of(member).is_some_and(|worker| releases_members || worker.status.draining)
        };
        let keep =
            job.row.members.iter().filter(|member| !leaves(member)).map(|member| member.worker.clone());
        // Members that leave may have the only copy of the state: they stay until it is in the
        // store.
        let keep: BTreeSet<String> = keep.collect();
        let may_leave = keep.len() == job.row.members.len() || self.state_is_safe(job, &keep).await?;
        let goes = |member: &MemberRow| is_lost(member) || (may_leave && leaves(member));
        if job.row.members.iter().any(goes) {
            let mut left = job.row.members.clone();
            left.retain(|member| !goes(member));
            job.update(&self.store, Vec::new(), |row| row.members = left).await?;
        }
        let remaining = if releases_members { Vec::new() } else { self.remaining_members(job) };
        if let Some(pending_group) = &mut job.pending_group {
            pending_group.remaining = remaining;
        }
        Ok(())
    }

    async fn pausing(&mut self, job: &mut Job) -> Result<(), StoreError> {
        if self.accept_result(job).await? {
            return Ok(());
        }
        let members = job.members(&self.workers);
        let timed_out = self.timed_out_ranks(job, &members);
        let busy = members.iter().enumerate().any(|(rank, member)| match member {
            MemberState::Disconnected => true,
            MemberState::InGroup(held) => {
                matches!(held.phase(), Phase::Training | Phase::Forming | Phase::Exporting)
                    && !timed_out.contains(&rank)
            }
            MemberState::Lost | MemberState::OtherGeneration(_) => false,
        });
        let broken =
            members.iter().any(|m| matches!(m, MemberState::Lost) || m.phase() == Some(Phase::Broken));
        if broken {
            job.broken_since.get_or_insert_with(Instant::now);
        }
        let settled = job.broken_since.is_some_and(|since| since.elapsed() >= self.config.recovery.settle());
        if busy && !settled {
            return Ok(());
        }
        if self.state_is_safe(job, &BTreeSet::new()).await? {
            job.transition_to(&self.store, JobState::Paused, Vec::new(), |_| ()).await?;
        }
        Ok(())
    }

    /// Accepts the result if rank 0 has uploaded it. Returns whether rank 0 has finished; the
    /// result may then still wait for the last steps, or have failed the job.
    async fn accept_result(&self, job: &mut Job) -> Result<bool, StoreError> {
        let members = job.members(&self.workers);
        let Some(MemberState::InGroup(held)) = members.first().filter(|m| m.phase() == Some(Phase::Finished))
        else {
            return Ok(false);
        };
        let (files, steps) = (held.files.clone(), held.completed_steps);
        let since = self.seconds_in_phase(job, 0);
        if self.store.last_step(&job.row.id).await? < steps && since < LAST_STEPS_TIMEOUT.as_secs_f64() {
            return Ok(true);
        }
        let mut next = job.row.clone();
        crate::control::job::set_state(&mut next, JobState::Succeeded);
        next.completed_steps = next.completed_steps.max(steps);
        match self.store.commit_result(&next, &files, vec![crate::control::job::state_changed(&next)]).await?
        {
            Ok(files) => {
                tracing::info!(job = next.id, files = files.len(), steps, "job succeeded");
                job.row = next;
            }
            Err(missing) => {
                let cause = format!("the file {} is missing in the result", missing.0);
                let worker = job.row.members.first().map(|member| member.worker.clone());
                self.fail(job, v1::Failure { worker, rank: Some(0), completed_steps: steps, cause }).await?;
            }
        }
        Ok(true)
    }

    /// Whether a member in `keep` has the newest state, or the state is in the store. If not,
    /// selects a member that must save it.
    async fn state_is_safe(&self, job: &mut Job, keep: &BTreeSet<String>) -> Result<bool, StoreError> {
        let members = job.members(&self.workers);
        let timed_out = self.timed_out_ranks(job, &members);
        let holds = |(rank, member): (usize, &MemberState)| {
            let steps = member.steps().filter(|_| !timed_out.contains(&rank))?;
            Some((steps, job.row.members.get(rank)?.worker.clone()))
        };
        let holders: Vec<(u64, String)> = members.iter().enumerate().filter_map(holds).collect();
        let newest = holders.iter().map(|(steps, _)| *steps).max().unwrap_or(0);
        let kept = holders.iter().filter(|(_, worker)| keep.contains(worker)).map(|(steps, _)| *steps).max();
        let stored = self.store.newest_checkpoint(&job.row.id).await?.map_or(0, |checkpoint| checkpoint.step);
        if newest <= kept.unwrap_or(0).max(stored) {
            job.saving_member = None;
            return Ok(true);
        }
        let is_holder =
            |worker: &String| holders.iter().any(|(steps, holder)| *steps == newest && holder == worker);
        if !job.saving_member.as_ref().is_some_and(is_holder) {
            job.saving_member =
                holders.iter().find(|(steps, _)| *steps == newest).map(|(_, worker)| worker.clone());
        }
        Ok(false)
    }

    /// The members that are connected and not draining.
    fn remaining_members(&self, job: &Job) -> Vec<MemberRow> {
        let stays = |member: &&MemberRow| {
            member_process(member, &self.workers)
                .is_some_and(|worker| worker.is_connected() && !worker.status.draining)
        };
        job.row.members.iter().filter(stays).cloned().collect()
    }

    fn draining_member(&self, job: &Job) -> Option<String> {
        let leaves = |member: &&MemberRow| {
            member_process(member, &self.workers)
                .is_some_and(|worker| worker.is_connected() && worker.status.draining)
        };
        Some(job.row.members.iter().find(leaves)?.worker.clone())
    }

    /// Records that a new group must be formed of the remaining members, as planned.
    fn replace_group(&self, job: &mut Job, reason: String) {
        let remaining = self.remaining_members(job);
        job.pending_group = Some(PendingGroup { reason, remaining, events: Vec::new(), is_failure: false });
    }

    /// Records that the group broke, and that a new one must be formed of the members that are
    /// alive and can reach each other. `timed_out` are the ranks that exceeded a time limit. The
    /// scheduler forms the new group (`Service::place` in `scheduler/apply.rs`).
    fn break_group(&self, job: &mut Job, timed_out: &[usize]) {
        let members = job.members(&self.workers);
        let ranks = |list: &[u32]| list.iter().map(|rank| *rank as usize).collect::<Vec<_>>();
        let report = |(rank, member): (usize, &MemberState)| MemberReport {
            alive: matches!(member, MemberState::InGroup(_) | MemberState::OtherGeneration(_))
                && !timed_out.contains(&rank),
            suspects: member.held().map(|held| ranks(&held.suspects)).unwrap_or_default(),
            unreachable: member.held().map(|held| ranks(&held.unreachable)).unwrap_or_default(),
        };
        let reports: Vec<MemberReport> = members.iter().enumerate().map(report).collect();
        let mut causes = Vec::new();
        let mut events = Vec::new();
        let mut excluded = Vec::new();
        let decision = decide_membership(&reports);
        for (rank, reason) in &decision.evicted {
            let Some(row) = job.row.members.get(*rank) else { continue };
            let cause = match (&members[*rank], reason) {
                (_, EvictionReason::Unreachable(peers)) => {
                    excluded.push(row.instance_id.clone());
                    format!("this worker and ranks {peers:?} cannot reach each other")
                }
                (MemberState::InGroup(held), EvictionReason::Dead) => {
                    format!(
                        "no progress while {} for {:.0} s",
                        phase_name(held.phase()),
                        self.seconds_in_phase(job, *rank)
                    )
                }
                (_, EvictionReason::Dead) => {
                    "the connection was lost, or no heartbeat came in time".to_owned()
                }
            };
            causes.push(format!("{} (rank {rank}): {cause}", row.worker));
            events.push(job_event::Kind::WorkerLost(v1::WorkerLost {
                worker: row.worker.clone(),
                rank: *rank as u32,
                cause,
            }));
        }
        for (row, held) in job.row.members.iter().zip(&members).filter_map(|(row, m)| Some((row, m.held()?)))
        {
            if held.phase() == Phase::Broken {
                causes.push(format!("{} reports: {}", row.worker, held.cause));
                if decision.evicted.is_empty() {
                    events.push(notice(held.completed_steps, format!("{}: {}", row.worker, held.cause)));
                }
            }
        }
        let remaining = decision.keep.iter().filter_map(|rank| job.row.members.get(*rank).cloned());
        let remaining: Vec<MemberRow> = remaining.collect();
        let reason = causes.first().cloned().unwrap_or_else(|| "the group broke".to_owned());
        tracing::warn!(job = job.row.id, generation = job.row.generation, causes = ?causes, "group broke");
        job.excluded.extend(excluded);
        job.pending_group = Some(PendingGroup { reason, remaining, events, is_failure: true });
    }

    /// The ranks whose phase has exceeded its time limit. A rank that waits for its peers is
    /// included only if every rank waits: a peer that does not wait has its own time limit, which
    /// may end later. A disconnected or lost peer is not known to wait.
    fn timed_out_ranks(&self, job: &Job, members: &[MemberState]) -> Vec<usize> {
        let recovery = &self.config.recovery;
        let limit = |member: &MemberState| match member.phase()? {
            Phase::Preparing => Some(recovery.preparing_seconds),
            Phase::Forming => Some(recovery.forming_seconds),
            Phase::Training => Some(recovery.step_seconds),
            Phase::Saving => Some(recovery.saving_seconds),
            Phase::Exporting => Some(recovery.exporting_seconds),
            _ => None,
        };
        let limited = || members.iter().enumerate().filter_map(|(rank, m)| Some((rank, m, limit(m)?)));
        let waits =
            |member: &MemberState| matches!(member, MemberState::InGroup(held) if held.waiting_for_peers);
        let is_absent =
            |member: &MemberState| matches!(member, MemberState::Disconnected | MemberState::Lost);
        let all_wait = limited().all(|(_, member, _)| waits(member)) && !members.iter().any(is_absent);
        limited()
            .filter(|(rank, member, limit)| {
                self.seconds_in_phase(job, *rank) > *limit && (all_wait || !waits(member))
            })
            .map(|(rank, ..)| rank)
            .collect()
    }

    fn seconds_in_phase(&self, job: &Job, rank: usize) -> f64 {
        let member = job.row.members.get(rank).and_then(|member| member_process(member, &self.workers));
        member.map_or(0.0, |worker| worker.seconds_in_phase())
    }
}

/// An event with a text for users.
fn notice(step: u64, text: String) -> job_event::Kind {
    job_event::Kind::Notice(v1::Notice { worker: String::new(), step, text })
}
