//! Jobs and workers as the placement sees them.

use std::collections::{BTreeMap, BTreeSet};

use lora_spec::{DeviceKind, JobState};

use super::placement::{JobIndex, JobPhase, NumericsId, SchedulableJob, SchedulableWorker, WorkerId};
use crate::control::group::GroupPhase;
use crate::control::job::Job;
use crate::control::member::member_process;
use crate::control::workers::{Worker, Workers};
use crate::store::MemberRow;

/// The jobs that the scheduler may change, and all workers.
pub(super) struct View<'a> {
    pub(super) jobs: Vec<SchedulableJob>,
    pub(super) workers: Vec<SchedulableWorker>,
    by_index: Vec<&'a Job>,
    by_id: Vec<(&'a String, &'a Worker)>,
}

impl<'a> View<'a> {
    pub(super) fn new(by_index: Vec<&'a Job>, workers: &'a Workers) -> Self {
        let by_id: Vec<(&String, &Worker)> = workers.iter().collect();
        let kinds = Kinds::new(workers);
        let members: BTreeSet<&String> =
            by_index.iter().flat_map(|job| &job.row.members).map(|member| &member.worker).collect();
        let job = |(index, job): (usize, &&Job)| job_view(JobIndex(index), job, &by_id, &kinds, workers);
        let worker = |(index, (name, worker)): (usize, &(&String, &Worker))| {
            Some(SchedulableWorker {
                id: WorkerId(index),
                numerics: kinds.of(worker)?,
                free: worker.is_free() && !members.contains(name),
                is_available: worker.is_available(),
                memory: worker.memory(),
            })
        };
        Self {
            jobs: by_index.iter().enumerate().filter_map(job).collect(),
            workers: by_id.iter().enumerate().filter_map(worker).collect(),
            by_index,
            by_id,
        }
    }

    pub(super) fn job(&self, index: JobIndex) -> Option<&'a Job> {
        self.by_index.get(index.0).copied()
    }

    /// The worker as a member of a new group.
    pub(super) fn worker(&self, id: WorkerId) -> Option<MemberRow> {
        let (name, worker) = self.by_id.get(id.0)?;
        Some(MemberRow {
            worker: (*name).clone(),
            instance_id: worker.hello.instance_id.clone(),
            peer_address: worker.hello.peer_address.clone(),
        })
    }
}

fn job_view(
    id: JobIndex,
    job: &Job,
    workers_by_id: &[(&String, &Worker)],
    kinds: &Kinds,
    workers: &Workers,
) -> Option<SchedulableJob> {
    let min = job.spec.workers.min;
    let started = |members: &[MemberRow], wants_members| JobPhase::Started {
        held: members.len(),
        numerics: members.iter().find_map(|member| kinds.of(member_process(member, workers)?)),
        wants_members,
    };
    let phase = match (job.state(), &job.phase) {
        (JobState::Queued, _) => JobPhase::Queued,
        (JobState::Running, GroupPhase::Training) => started(&job.row.members, false),
        (JobState::Preparing | JobState::Recovering | JobState::Running | JobState::Waiting, phase) => {
            let remaining = &phase.regroup()?.remaining;
            started(remaining, remaining.len() < min)
        }
        _ => return None,
    };
    let is_excluded = |name: &str, worker: &Worker| job.excludes(name, &worker.hello.instance_id);
    let excluded = workers_by_id.iter().enumerate().filter(|(_, (name, worker))| is_excluded(name, worker));
    let bytes = |device| job.row.requirements.as_ref().map_or(0, |requirements| requirements.peak(device));
    Some(SchedulableJob {
        id,
        priority: job.row.priority,
        sequence: job.row.sequence,
        min,
        max: job.spec.workers.max,
        phase,
        excluded: excluded.map(|(worker, _)| WorkerId(worker)).collect(),
        cpu_bytes: bytes(DeviceKind::Cpu),
        gpu_bytes: bytes(DeviceKind::Gpu),
    })
}

/// A number for each `numerics_id` of the known workers.
struct Kinds(BTreeMap<String, NumericsId>);

impl Kinds {
    fn new(workers: &Workers) -> Self {
        let ids: BTreeSet<&String> = workers.iter().map(|(_, worker)| &worker.hello.numerics_id).collect();
        let known = ids.into_iter().filter(|id| !id.is_empty()).enumerate();
        Self(known.map(|(number, id)| (id.clone(), NumericsId(number))).collect())
    }

    fn of(&self, worker: &Worker) -> Option<NumericsId> {
        self.0.get(&worker.hello.numerics_id).copied()
    }
}
