//! Workers to jobs: the pure schedule, applied.

use std::collections::{BTreeMap, BTreeSet};

use lora_proto::v1::{self, job_event};
use lora_spec::JobState;

use crate::job::{Job, process};
use crate::reconcile::Regroup;
use crate::schedule::{JobIndex, JobPhase, JobView, KindId, WorkerId, WorkerView, schedule};
use crate::service::Service;
use crate::store::{JobRow, MemberRow, StoreError};
use crate::workers::has_state;

impl Service {
    /// Forms the groups that can be formed, and says of the other jobs what they wait for.
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
            let too_large = |limit, gpu| {
                let requirements = job.row.requirements.as_ref();
                requirements.and_then(|requirements| requirements.too_large(limit, gpu)).unwrap_or_default()
            };
            let waiting = plan.waiting.iter().find(|(waiting, _)| *waiting == view.id);
            let reason = waiting.map(|(_, reason)| reason.sentence(name, too_large));
            let placed = self.place(&mut job, workers, reason).await;
            if !job.state().is_at_rest() {
                self.jobs.insert(job.row.id.clone(), job);
            }
            placed?;
        }
        Ok(())
    }

    /// Gives a job its new workers, or has it wait.
    async fn place(
        &mut self,
        job: &mut Job,
        new: Vec<String>,
        reason: Option<String>,
    ) -> Result<(), StoreError> {
        match (job.state(), job.regroup.clone()) {
            (JobState::Running, None) => {
                if !new.is_empty() && job.change.is_none() {
                    job.change = Some(format!("{} can join", new.join(", ")));
                    self.touched.insert(job.row.id.clone());
                }
                Ok(())
            }
            (JobState::Queued, _) if new.is_empty() => self.wait(job, reason).await,
            (JobState::Queued, _) => {
                let regroup =
                    Regroup { reason: String::new(), stay: Vec::new(), events: Vec::new(), broke: false };
                self.form(job, regroup, new).await
            }
            (_, Some(regroup)) if regroup.stay.len() + new.len() >= job.spec.workers.min => {
                self.form(job, regroup, new).await
            }
            (_, Some(regroup)) => self.hold(job, regroup, reason).await,
            (_, None) => Ok(()),
        }
    }

    async fn wait(&self, job: &mut Job, reason: Option<String>) -> Result<(), StoreError> {
        let reason = reason.unwrap_or_default();
        if job.row.waiting_for == reason {
            return Ok(());
        }
        job.update(&self.store, Vec::new(), |row| row.waiting_for = reason).await
    }

    /// Fewer members than the job needs are left: they hold its state until others come.
    async fn hold(
        &mut self,
        job: &mut Job,
        regroup: Regroup,
        reason: Option<String>,
    ) -> Result<(), StoreError> {
        if job.state() != JobState::Waiting {
            let fruitless = Self::fruitless(job, &regroup);
            if regroup.broke && fruitless >= self.config.recovery.fruitless_generations {
                return self.give_up(job, &regroup, fruitless).await;
            }
            let Regroup { stay, events, .. } = regroup.clone();
            self.touched.insert(job.row.id.clone());
            let leaving: Vec<String> = job.row.members.iter().map(|member| member.worker.clone()).collect();
            let change = |row: &mut JobRow| (row.members, row.fruitless) = (stay, fruitless);
            job.become_state(&self.store, JobState::Waiting, events, change).await?;
            self.tell(leaving);
            job.regroup = Some(Regroup { events: Vec::new(), broke: false, ..regroup });
            job.change = None;
            job.broken_since = None;
        }
        self.wait(job, reason).await
    }

    /// Forms a group: those that stay first, the newest state before the others, so that the first rank needs no other's.
    async fn form(&mut self, job: &mut Job, regroup: Regroup, new: Vec<String>) -> Result<(), StoreError> {
        let fruitless = Self::fruitless(job, &regroup);
        if regroup.broke && fruitless >= self.config.recovery.fruitless_generations {
            return self.give_up(job, &regroup, fruitless).await;
        }
        let Regroup { reason, mut stay, mut events, .. } = regroup;
        let held_steps = |member: &MemberRow| {
            let held = process(member, &self.workers).and_then(|worker| worker.held());
            held.filter(|held| held.job_id == job.row.id && has_state(held.phase()))
                .map(|held| held.completed_steps)
        };
        stay.sort_by_key(|member| std::cmp::Reverse(held_steps(member)));
        let held = stay.first().and_then(held_steps);
        let stored = self.store.newest_checkpoint(&job.row.id).await?;
        let checkpoint = stored.filter(|stored| held.is_none_or(|held| held < stored.step));
        let join = |name: String| {
            let hello = &self.workers.get(&name)?.hello;
            let (instance_id, peer_address) = (hello.instance_id.clone(), hello.peer_address.clone());
            Some(MemberRow { worker: name, instance_id, peer_address })
        };
        let members: Vec<MemberRow> = stay.into_iter().chain(new.into_iter().filter_map(join)).collect();
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
        let told: BTreeSet<String> =
            before.chain(members.iter().map(|member| member.worker.clone())).collect();
        let change = |row: &mut JobRow| {
            row.fruitless = fruitless;
            row.generation = generation;
            row.members = members;
            row.token = token;
        };
        job.become_state(&self.store, state, events, change).await?;
        job.assign(checkpoint);
        job.regroup = None;
        job.change = None;
        job.started = false;
        job.saver = None;
        job.broken_since = None;
        job.steps_at_start = job.row.completed_steps;
        self.tell(told);
        self.touched.insert(job.row.id.clone());
        Ok(())
    }

    /// Groups in a row that broke without a finished step, this one included.
    fn fruitless(job: &Job, regroup: &Regroup) -> u32 {
        match regroup.broke {
            false => job.row.fruitless,
            true if job.row.completed_steps > job.steps_at_start => 0,
            true => job.row.fruitless + 1,
        }
    }

    /// Fails a job whose groups get nowhere, with what was seen of the last one.
    async fn give_up(&self, job: &mut Job, regroup: &Regroup, fruitless: u32) -> Result<(), StoreError> {
        let cause = format!(
            "{fruitless} groups in a row broke without a finished step; the last one: {}",
            regroup.reason
        );
        let completed_steps = job.row.completed_steps;
        self.fail(job, v1::Failure { cause, completed_steps, ..v1::Failure::default() }).await
    }

    fn job_views(&self, ids: &[String], names: &[String]) -> Vec<JobView> {
        let kinds = self.kinds();
        let view = |(index, id): (usize, &String)| {
            let job = self.jobs.get(id)?;
            let phase = match (job.state(), &job.regroup) {
                (JobState::Queued, _) => JobPhase::Queued,
                (JobState::Running, None) if job.change.is_none() => JobPhase::Begun {
                    held: job.row.members.len(),
                    kind: self.kind_of(&job.row.members, &kinds),
                    wants_members: false,
                    growable: true,
                },
                (state, Some(regroup)) if state.is_active() => JobPhase::Begun {
                    held: regroup.stay.len(),
                    kind: self.kind_of(&regroup.stay, &kinds),
                    wants_members: regroup.stay.len() < job.spec.workers.min,
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
            let bytes = |gpu| job.row.requirements.as_ref().map_or(0, |requirements| requirements.peak(gpu));
            let (cpu_bytes, gpu_bytes) = (bytes(false), bytes(true));
            let id = JobIndex(index);
            Some(JobView { id, priority, sequence, min, max, phase, excluded, cpu_bytes, gpu_bytes })
        };
        ids.iter().enumerate().filter_map(view).collect()
    }

    fn worker_views(&self, names: &[String]) -> Vec<WorkerView> {
        let kinds = self.kinds();
        let taken: BTreeSet<&String> =
            self.jobs.values().flat_map(|job| &job.row.members).map(|member| &member.worker).collect();
        let view = |(index, name): (usize, &String)| {
            let worker = self.workers.get(name)?;
            let kind = kinds.get(&worker.hello.numerics_id)?;
            let free = worker.is_free() && !taken.contains(name);
            let counts = worker.counts();
            let (memory, gpu) = worker.memory();
            Some(WorkerView { id: WorkerId(index), kind: KindId(*kind), free, counts, memory, gpu })
        };
        names.iter().enumerate().filter_map(view).collect()
    }

    /// Numerics by number.
    fn kinds(&self) -> BTreeMap<String, usize> {
        let all: BTreeSet<&String> =
            self.workers.iter().map(|(_, worker)| &worker.hello.numerics_id).collect();
        all.into_iter().filter(|id| !id.is_empty()).enumerate().map(|(n, id)| (id.clone(), n)).collect()
    }

    fn kind_of(&self, members: &[MemberRow], kinds: &BTreeMap<String, usize>) -> Option<KindId> {
        let worker = members.iter().find_map(|member| process(member, &self.workers))?;
        kinds.get(&worker.hello.numerics_id).copied().map(KindId)
    }
}
