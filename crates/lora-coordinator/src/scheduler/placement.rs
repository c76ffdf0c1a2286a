//! The assignment of free workers to jobs: a pure function of the jobs and the workers.
//!
//! A kind is a set of workers with the same `numerics_id`; a group has members of one kind. Started
//! jobs that lack members are served first, then the queue, then the growth of running jobs. If a
//! job has to wait for busy workers, it reserves the free workers of their kind, so that smaller
//! jobs behind it cannot starve it. A job that no set of workers can run blocks no other job. A
//! worker with less memory than a job needs does not count for this job.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use lora_spec::{DeviceKind, DeviceMemory};

use crate::control::job::precedence;

/// The number of a job, given by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct JobIndex(pub(crate) usize);

/// The number of a worker, given by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct WorkerId(pub(crate) usize);

/// The number of a kind of workers: those with the same `numerics_id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NumericsId(pub(crate) usize);

/// A job, as the scheduler sees it.
#[derive(Debug, Clone)]
pub(crate) struct SchedulableJob {
    /// Unique among the jobs.
    pub(crate) id: JobIndex,
    /// Jobs with a higher priority come first.
    pub(crate) priority: i32,
    /// The order of jobs with the same priority: a lower number is older. Unique among the jobs.
    pub(crate) sequence: i64,
    /// The smallest number of workers that can run the job; at least 1.
    pub(crate) min: usize,
    /// The largest number of workers that the job can use; at least `min`.
    pub(crate) max: usize,
    /// Whether the job has started, and what it has.
    pub(crate) phase: JobPhase,
    /// Workers that the job may not use.
    pub(crate) excluded: Vec<WorkerId>,
    /// Bytes that the job needs on each CPU worker; 0 if not known.
    pub(crate) cpu_bytes: u64,
    /// Bytes that the job needs on each GPU worker; 0 if not known.
    pub(crate) gpu_bytes: u64,
}

/// The part of a job's state that matters to the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobPhase {
    /// The job has no workers and waits for a group.
    Queued,
    /// The job has started.
    Started {
        /// The number of members that are alive and stay.
        held: usize,
        /// The kind of its members, to which the job is bound. `None` only if it has no members.
        numerics: Option<NumericsId>,
        /// Whether the job needs members, up to `min`, to form a new group. More may join, up to
        /// `max`.
        wants_members: bool,
    },
}

/// A worker, as the scheduler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SchedulableWorker {
    /// Unique among the workers.
    pub(crate) id: WorkerId,
    /// The worker's kind.
    pub(crate) numerics: NumericsId,
    /// Whether the worker is connected, without a job and not draining.
    pub(crate) free: bool,
    /// Whether the worker is connected and not draining: it is free, or may become free.
    pub(crate) is_available: bool,
    /// The memory that a job may use on this worker.
    pub(crate) memory: DeviceMemory,
}

/// The workers that jobs get, and the reasons why other jobs wait.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Schedule {
    /// New workers for jobs, in addition to their members; lower ids first.
    pub(crate) assign: Vec<(JobIndex, Vec<WorkerId>)>,
    /// Jobs that lack workers and get none, in the order in which jobs are served.
    pub(crate) waiting: Vec<(JobIndex, WaitReason)>,
}

/// The reason why a job waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitReason {
    /// The job could not run even if every worker were free.
    NotEnoughWorkers {
        /// The number of workers of one kind that the job needs, including its members.
        needed: usize,
        /// The number of available workers of the most common kind, or of the job's own kind.
        exist_of_best_kind: usize,
        /// The number of kinds that the job could run on.
        kinds: usize,
        /// Workers that are not counted above because the job may not use them.
        excluded: usize,
        /// Workers that are not counted above because they have too little memory.
        too_small: usize,
    },
    /// Every worker that the job may use has too little memory.
    TooLarge {
        /// The largest memory of these workers.
        largest: DeviceMemory,
    },
    /// There are enough workers, but other jobs use them.
    Busy {
        /// The number of workers of one kind that the job needs in addition to its members.
        needed: usize,
        /// The number of free workers of this kind.
        free: usize,
        /// The number of available workers of this kind, without the job's members.
        exist: usize,
    },
    /// Another job, which comes first, waits for workers of the same kind.
    Behind {
        /// The first job that waits for this kind.
        job: JobIndex,
    },
}

impl WaitReason {
    /// The reason as text: "waits for ", then what the job waits for. `name` returns the name of a
    /// job. `too_large` returns the text that compares the memory that the job needs with a
    /// worker's memory.
    pub(crate) fn sentence(
        &self,
        name: impl Fn(JobIndex) -> String,
        too_large: impl Fn(DeviceMemory) -> String,
    ) -> String {
        match *self {
            Self::NotEnoughWorkers { needed, exist_of_best_kind, kinds, excluded, too_small } => {
                let workers = match needed {
                    1 => "1 worker".to_owned(),
                    n => format!("{n} workers of one kind"),
                };
                let connected = match (exist_of_best_kind, kinds) {
                    (0, _) => "none is connected".to_owned(),
                    (n, 0 | 1) => format!("{n} {} connected", are(n)),
                    (n, kinds) => format!("none of the {kinds} connected kinds has more than {n}"),
                };
                let not_counted = match (excluded, too_small) {
                    (0, 0) => String::new(),
                    (n, 0) => format!(" (not counting {n} that it may not use)"),
                    (0, n) => format!(" (not counting {n} with too little memory)"),
                    (n, m) => {
                        format!(" (not counting {n} that it may not use and {m} with too little memory)")
                    }
                };
                format!("waits for {workers}: {connected}{not_counted}")
            }
            Self::TooLarge { largest } => {
                format!("waits for a worker with more memory: {}", too_large(largest))
            }
            Self::Busy { needed, free, exist } => {
                let workers = if needed == 1 { "worker" } else { "workers" };
                let free = match free {
                    0 => format!("none of {exist} is free"),
                    n => format!("{n} of {exist} {} free", are(n)),
                };
                format!("waits for {needed} {workers}: {free}")
            }
            Self::Behind { job } => format!("waits for job {}, which comes first", name(job)),
        }
    }
}

/// Assigns free workers to jobs. The result does not depend on the order of the arguments.
pub(crate) fn schedule(jobs: &[SchedulableJob], workers: &[SchedulableWorker]) -> Schedule {
    let mut pool = WorkerPool::new(workers);
    let mut given = BTreeMap::new();
    let mut waiting = Vec::new();
    for job in queue_order(jobs) {
        match pool.serve(job) {
            Ok(workers) => {
                given.insert(job.id, workers);
            }
            Err(reason) => waiting.push((job.id, reason)),
        }
    }
    for job in growth_order(jobs) {
        let Some(members) = given.get(&job.id).map(Vec::as_slice).or(job.growable().then_some(&[])) else {
            continue;
        };
        let more = pool.grow(job, members);
        if !more.is_empty() {
            given.entry(job.id).or_default().extend(more);
        }
    }
    let assign = given
        .into_iter()
        .map(|(job, mut workers)| {
            workers.sort_unstable();
            (job, workers)
        })
        .collect();
    Schedule { assign, waiting }
}

/// The jobs that lack workers, in the order in which they are served.
fn queue_order(jobs: &[SchedulableJob]) -> Vec<&SchedulableJob> {
    let mut lacking: Vec<&SchedulableJob> = jobs.iter().filter(|job| job.lacks_members()).collect();
    lacking.sort_by_key(|job| (job.phase == JobPhase::Queued, precedence(job.priority, job.sequence)));
    lacking
}

/// The started jobs, in the order in which they grow.
fn growth_order(jobs: &[SchedulableJob]) -> Vec<&SchedulableJob> {
    let mut started: Vec<&SchedulableJob> = jobs.iter().filter(|job| job.phase != JobPhase::Queued).collect();
    started.sort_by_key(|job| precedence(job.priority, job.sequence));
    started
}

impl SchedulableJob {
    fn held(&self) -> usize {
        match self.phase {
            JobPhase::Queued => 0,
            JobPhase::Started { held, .. } => held,
        }
    }

    /// The number of workers that the job needs in addition to its members.
    fn needed(&self) -> usize {
        self.min.saturating_sub(self.held())
    }

    fn lacks_members(&self) -> bool {
        match self.phase {
            JobPhase::Queued => true,
            JobPhase::Started { wants_members, .. } => wants_members && self.needed() > 0,
        }
    }

    fn growable(&self) -> bool {
        matches!(self.phase, JobPhase::Started { .. }) && self.needed() == 0
    }

    fn may_run_on(&self, numerics: NumericsId) -> bool {
        !matches!(self.phase, JobPhase::Started { numerics: Some(own), .. } if own != numerics)
    }

    /// Whether the job may use the worker, aside from the worker's memory.
    fn is_eligible(&self, worker: &SchedulableWorker) -> bool {
        self.may_run_on(worker.numerics) && !self.excluded.contains(&worker.id)
    }

    fn fits(&self, worker: &SchedulableWorker) -> bool {
        worker.memory.bytes
            >= match worker.memory.kind {
                DeviceKind::Cpu => self.cpu_bytes,
                DeviceKind::Gpu => self.gpu_bytes,
            }
    }

    fn may_use(&self, worker: &SchedulableWorker) -> bool {
        self.is_eligible(worker) && self.fits(worker)
    }
}

/// The workers during the assignment.
struct WorkerPool<'a> {
    workers: &'a [SchedulableWorker],
    /// Free workers that are neither assigned nor reserved.
    free: BTreeMap<WorkerId, &'a SchedulableWorker>,
    /// The first job that waits for workers of each kind.
    first_waiting: BTreeMap<NumericsId, JobIndex>,
    /// The kinds that a waiting job could run on when their workers are free.
    wanted: BTreeSet<NumericsId>,
}

impl<'a> WorkerPool<'a> {
    fn new(workers: &'a [SchedulableWorker]) -> Self {
        let free = workers.iter().filter(|w| w.free).map(|w| (w.id, w)).collect();
        Self { workers, free, first_waiting: BTreeMap::new(), wanted: BTreeSet::new() }
    }

    /// Assigns the workers that `job` lacks. If there are too few, reserves the free ones for the
    /// job and returns the reason why it waits.
    fn serve(&mut self, job: &SchedulableJob) -> Result<Vec<WorkerId>, WaitReason> {
        let free = count_kinds(job, self.free.values().copied());
        let enough = free.iter().filter(|(_, n)| **n >= job.needed());
        if let Some((numerics, n)) = enough.max_by_key(|(numerics, n)| (**n, Reverse(**numerics))) {
            let most = match job.phase {
                JobPhase::Queued => job.max,
                // More workers than needed are growth, which comes after the queue.
                JobPhase::Started { .. } => job.needed(),
            };
            return Ok(self.take(job, *numerics, most.min(*n)));
        }
        let exist = count_kinds(job, self.workers.iter().filter(|w| w.is_available));
        let best = exist.iter().max_by_key(|(numerics, n)| (**n, Reverse(**numerics)));
        let (numerics, exist_of_best_kind) = match best {
            Some((numerics, n)) if *n >= job.min => (*numerics, *n),
            best => {
                let too_small = || self.too_small_for(job);
                return Err(match too_small().max_by_key(|w| w.memory) {
                    Some(largest) if best.is_none() => WaitReason::TooLarge { largest: largest.memory },
                    _ => WaitReason::NotEnoughWorkers {
                        needed: job.min,
                        exist_of_best_kind: best.map_or(0, |(_, n)| *n),
                        kinds: exist.len(),
                        excluded: self.excluded_by(job),
                        too_small: too_small().count(),
                    },
                });
            }
        };
        self.wanted.extend(exist.iter().filter(|(_, n)| **n >= job.min).map(|(numerics, _)| *numerics));
        let reserved = self.take(job, numerics, usize::MAX).len();
        let first = *self.first_waiting.entry(numerics).or_insert(job.id);
        if first != job.id {
            return Err(WaitReason::Behind { job: first });
        }
        let exist = exist_of_best_kind.saturating_sub(job.held());
        Err(WaitReason::Busy { needed: job.needed(), free: reserved, exist })
    }

    /// Assigns more free workers, which no other job waits for, to a started job. `members` are the
    /// workers that [`WorkerPool::serve`] just assigned to it.
    fn grow(&mut self, job: &SchedulableJob, members: &[WorkerId]) -> Vec<WorkerId> {
        let most = job.max.saturating_sub(job.held() + members.len());
        let bound = self.workers.iter().find(|w| members.contains(&w.id)).map(|w| w.numerics);
        let free = count_kinds(job, self.free.values().copied());
        let open = free.iter().filter(|(numerics, _)| {
            !self.wanted.contains(numerics) && bound.is_none_or(|bound| bound == **numerics)
        });
        match open.max_by_key(|(numerics, n)| (**n, Reverse(**numerics))) {
            Some((numerics, n)) => self.take(job, *numerics, most.min(*n)),
            None => Vec::new(),
        }
    }

    /// Takes at most `most` free workers of a kind that `job` may use.
    fn take(&mut self, job: &SchedulableJob, numerics: NumericsId, most: usize) -> Vec<WorkerId> {
        let usable = self.free.values().filter(|w| w.numerics == numerics && job.may_use(w)).map(|w| w.id);
        let taken: Vec<WorkerId> = usable.take(most).collect();
        self.free.retain(|id, _| !taken.contains(id));
        taken
    }

    fn excluded_by(&self, job: &SchedulableJob) -> usize {
        let excluded =
            |w: &&SchedulableWorker| w.is_available && job.may_run_on(w.numerics) && !job.is_eligible(w);
        self.workers.iter().filter(excluded).count()
    }

    fn too_small_for(&self, job: &SchedulableJob) -> impl Iterator<Item = &SchedulableWorker> {
        self.workers.iter().filter(|w| w.is_available && job.is_eligible(w) && !job.fits(w))
    }
}

/// The number of workers that `job` may use, by kind.
fn count_kinds<'a>(
    job: &SchedulableJob,
    workers: impl Iterator<Item = &'a SchedulableWorker>,
) -> BTreeMap<NumericsId, usize> {
    let mut counts = BTreeMap::new();
    for worker in workers.filter(|w| job.may_use(w)) {
        *counts.entry(worker.numerics).or_insert(0) += 1;
    }
    counts
}

fn are(n: usize) -> &'static str {
    if n == 1 { "is" } else { "are" }
}

#[cfg(test)]
mod tests;
