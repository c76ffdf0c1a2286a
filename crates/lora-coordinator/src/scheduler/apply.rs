//! Applies the schedule: forms groups, and records why the other jobs wait.

use std::collections::{BTreeMap, BTreeSet};

use lora_proto::v1::{self, job_event};
use lora_spec::{DeviceKind, JobState};

use super::placement::{
    JobIndex, JobPhase, NumericsId, SchedulableJob, SchedulableWorker, WorkerId, schedule,
};
use crate::control::job::{Job, member_process};
use crate::control::reconcile::PendingGroup;
use crate::control::service::Service;
use crate::control::workers::has_state;
use crate::store::{JobRow, MemberRow, StoreError};

impl Service {
    /// Forms the groups that can be formed, and stores for the other jobs what they wait for.
    pub(crate) async fn schedule(&mut self) -> Result<(), StoreError> {
        let ids: Vec<String> = self.jobs.keys().cloned().collect();
        let names: Vec<String> = self.workers.iter().map(|(name, _)| name.clone()).collect();
        let views = self.job_views(&ids, &names);
        if views.is_empty() {
            return Ok(());
        }
        let plan = schedule(&views, &self.worker_views(&names));
        let mut given: BTreeMap<JobIndex, Vec<String>> = BTreeMap::new();
        for (job, workers) in &plan.assign {
            given.insert(*job, workers.iter().filter_map(|worker| names.get(worker.0).cloned()).collect());
        }
        for view in &views {
            let Some(mut job) = ids.get(view.id.0).and_then(|id| self.jobs.remove(id)) else { continue };
            let workers = given.remove(&view.id).unwrap_or_default();
            let name = |other: JobIndex| ids.get(other.0).cloned().unwrap_or_default();
            let too_large = |limit| {
                let requirements = job.row.requirements.as_ref();
                requirements.and_then(|requirements| requirements.too_large(limit)).unwrap_or_default()
            };
            let waiting = plan.waiting.iter().find(|(waiting, _)| *waiting == view.id);
            let reason = waiting.map(|(_, reason)| reason.sentence(name, too_large));
            let placed = self.place(&mut job, workers, reason).await;
            if !job.state().is_stopped() {
                self.jobs.insert(job.row.id.clone(), job);
            }
            placed?;
        }
        Ok(())
    }

    /// Gives a job its new workers, or records why the job waits.
    async fn place(
        &mut self,
        job: &mut Job,
        new: Vec<String>,
        reason: Option<String>,
    ) -> Result<(), StoreError> {
        match (job.state(), job.pending_group.clone()) {
            (JobState::Running, None) => {
                if !new.is_empty() && job.planned_change.is_none() {
                    job.planned_change = Some(format!("{} can join", new.join(", ")));
                    self.dirty_jobs.insert(job.row.id.clone());
                }
                Ok(())
            }
            (JobState::Queued, _) if new.is_empty() => self.set_wait_reason(job, reason).await,
            (JobState::Queued, _) => {
                let pending_group = PendingGroup {
                    reason: String::new(),
                    remaining: Vec::new(),
                    events: Vec::new(),
                    is_failure: false,
                };
                self.form_group(job, pending_group, new).await
            }
            (_, Some(pending_group)) if pending_group.remaining.len() + new.len() >= job.spec.workers.min => {
                self.form_group(job, pending_group, new).await
            }
            (_, Some(pending_group)) => self.wait_for_members(job, pending_group, reason).await,
            (_, None) => Ok(()),
        }
    }

    async fn set_wait_reason(&self, job: &mut Job, reason: Option<String>) -> Result<(), StoreError> {
        let reason = reason.unwrap_or_default();
        if job.row.waiting_for == reason {
            return Ok(());
        }
        job.update(&self.store, Vec::new(), |row| row.waiting_for = reason).await
    }

    /// Moves a job to `waiting`: fewer members than it needs are left. They keep its state in
    /// memory until others join.
    async fn wait_for_members(
        &mut self,
        job: &mut Job,
        pending_group: PendingGroup,
        reason: Option<String>,
    ) -> Result<(), StoreError> {
        if job.state() != JobState::Waiting {
            let fruitless = Self::failed_generations(job, &pending_group);
            if pending_group.is_failure && fruitless >= self.config.recovery.fruitless_generations {
                return self.give_up(job, &pending_group, fruitless).await;
            }
            let PendingGroup { remaining, events, .. } = pending_group.clone();
            self.dirty_jobs.insert(job.row.id.clone());
            let leaving: Vec<String> = job.row.members.iter().map(|member| member.worker.clone()).collect();
            let change = |row: &mut JobRow| (row.members, row.fruitless) = (remaining, fruitless);
            job.transition_to(&self.store, JobState::Waiting, events, change).await?;
            self.mark_workers_dirty(leaving);
            job.pending_group = Some(PendingGroup { events: Vec::new(), is_failure: false, ..pending_group });
            job.planned_change = None;
            job.broken_since = None;
        }
        self.set_wait_reason(job, reason).await
    }

    /// Forms a group. The remaining members come first, those with the newest state before the
    /// others, so that rank 0 already has the newest state.
    async fn form_group(
        &mut self,
        job: &mut Job,
        pending_group: PendingGroup,
        new: Vec<String>,
    ) -> Result<(), StoreError> {
        let fruitless = Self::failed_generations(job, &pending_group);
        if pending_group.is_failure && fruitless >= self.config.recovery.fruitless_generations {
            return self.give_up(job, &pending_group, fruitless).await;
        }
        let PendingGroup { reason, mut remaining, mut events, .. } = pending_group;
        let steps_in_memory = |member: &MemberRow| {
            let held = member_process(member, &self.workers).and_then(|worker| worker.held());
            held.filter(|held| held.job_id == job.row.id && has_state(held.phase()))
                .map(|held| held.completed_steps)
        };
        remaining.sort_by_key(|member| std::cmp::Reverse(steps_in_memory(member)));
        let newest = remaining.first().and_then(steps_in_memory);
        let stored = self.store.newest_checkpoint(&job.row.id).await?;
        let checkpoint = stored.filter(|stored| newest.is_none_or(|newest| newest < stored.step));
        let join = |name: String| {
            let hello = &self.workers.get(&name)?.hello;
            let (instance_id, peer_address) = (hello.instance_id.clone(), hello.peer_address.clone());
            Some(MemberRow { worker: name, instance_id, peer_address })
        };
        let members: Vec<MemberRow> = remaining.into_iter().chain(new.into_iter().filter_map(join)).collect();
        let generation = job.row.generation + 1;
        events.push(job_event::Kind::Assigned(v1::Assigned {
            generation,
            workers: members.iter().map(|member| member.worker.clone()).collect(),
            checkpoint_step: checkpoint.as_ref().map(|checkpoint| checkpoint.step),
            reason,
        }));
        let state = if job.state() == JobState::Queued { JobState::Preparing } else { JobState::Recovering };
        let token = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
        let before = job.row.members.iter().map(|member| member.worker.clone());
        let affected: BTreeSet<String> =
            before.chain(members.iter().map(|member| member.worker.clone())).collect();
        let change = |row: &mut JobRow| {
            row.fruitless = fruitless;
            row.generation = generation;
            row.members = members;
            row.token = token;
        };
        job.transition_to(&self.store, state, events, change).await?;
        job.assign(checkpoint);
        job.pending_group = None;
        job.planned_change = None;
        job.training_started = false;
        job.saving_member = None;
        job.broken_since = None;
        job.steps_at_start = job.row.completed_steps;
        self.mark_workers_dirty(affected);
        self.dirty_jobs.insert(job.row.id.clone());
        Ok(())
    }

    /// The number of groups in a row that broke without a finished step, including this one.
    fn failed_generations(job: &Job, pending_group: &PendingGroup) -> u32 {
        match pending_group.is_failure {
            false => job.row.fruitless,
            true if job.row.completed_steps > job.steps_at_start => 0,
            true => job.row.fruitless + 1,
        }
    }

    /// Fails a job whose groups finish no step, with the cause of the last break.
    async fn give_up(
        &self,
        job: &mut Job,
        pending_group: &PendingGroup,
        fruitless: u32,
    ) -> Result<(), StoreError> {
        let cause = format!(
            "{fruitless} groups in a row broke without a finished step; the last one: {}",
            pending_group.reason
        );
        let completed_steps = job.row.completed_steps;
        self.fail(job, v1::Failure { cause, completed_steps, ..v1::Failure::default() }).await
    }

    fn job_views(&self, ids: &[String], names: &[String]) -> Vec<SchedulableJob> {
        let numerics_ids = self.numerics_ids();
        let view = |(index, id): (usize, &String)| {
            let job = self.jobs.get(id)?;
            let phase = match (job.state(), &job.pending_group) {
                (JobState::Queued, _) => JobPhase::Queued,
                (JobState::Running, None) if job.planned_change.is_none() => JobPhase::Started {
                    held: job.row.members.len(),
                    numerics: self.kind_of(&job.row.members, &numerics_ids),
                    wants_members: false,
                    growable: true,
                },
                (state, Some(pending_group)) if state.is_active() => JobPhase::Started {
                    held: pending_group.remaining.len(),
                    numerics: self.kind_of(&pending_group.remaining, &numerics_ids),
                    wants_members: pending_group.remaining.len() < job.spec.workers.min,
                    growable: true,
                },
                _ => return None,
            };
            let (min, max) = (job.spec.workers.min, job.spec.workers.max);
            let (priority, sequence) = (job.row.priority, job.row.sequence);
            let is_excluded = |name: &String| {
                self.workers.get(name).is_some_and(|worker| job.excluded.contains(&worker.hello.instance_id))
            };
            let excluded = names.iter().enumerate().filter(|(_, name)| is_excluded(name));
            let excluded = excluded.map(|(worker, _)| WorkerId(worker)).collect();
            let bytes =
                |device| job.row.requirements.as_ref().map_or(0, |requirements| requirements.peak(device));
            let (cpu_bytes, gpu_bytes) = (bytes(DeviceKind::Cpu), bytes(DeviceKind::Gpu));
            let id = JobIndex(index);
            Some(SchedulableJob { id, priority, sequence, min, max, phase, excluded, cpu_bytes, gpu_bytes })
        };
        ids.iter().enumerate().filter_map(view).collect()
    }

    fn worker_views(&self, names: &[String]) -> Vec<SchedulableWorker> {
        let numerics_ids = self.numerics_ids();
        let members: BTreeSet<&String> =
            self.jobs.values().flat_map(|job| &job.row.members).map(|member| &member.worker).collect();
        let view = |(index, name): (usize, &String)| {
            let worker = self.workers.get(name)?;
            let numerics = numerics_ids.get(&worker.hello.numerics_id)?;
            let free = worker.is_free() && !members.contains(name);
            let is_available = worker.is_available();
            Some(SchedulableWorker {
                id: WorkerId(index),
                numerics: NumericsId(*numerics),
                free,
                is_available,
                memory: worker.memory(),
            })
        };
        names.iter().enumerate().filter_map(view).collect()
    }

    /// A number for each `numerics_id` of the known workers.
    fn numerics_ids(&self) -> BTreeMap<String, usize> {
        let all: BTreeSet<&String> =
            self.workers.iter().map(|(_, worker)| &worker.hello.numerics_id).collect();
        all.into_iter().filter(|id| !id.is_empty()).enumerate().map(|(n, id)| (id.clone(), n)).collect()
    }

    fn kind_of(&self, members: &[MemberRow], numerics_ids: &BTreeMap<String, usize>) -> Option<NumericsId> {
        let worker = members.iter().find_map(|member| member_process(member, &self.workers))?;
        numerics_ids.get(&worker.hello.numerics_id).copied().map(NumericsId)
    }
}
