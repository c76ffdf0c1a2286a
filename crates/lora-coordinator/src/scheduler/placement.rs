//! Which free workers go to which jobs. A pure function over plain numbers.
//!
//! Jobs that have begun and lack members come first, then the queue, then the growth of jobs that run. A job whose workers
//! are there but busy reserves the free ones, so that smaller jobs behind it cannot starve it; a job that no set of workers
//! could run blocks nobody. A worker with less memory than a job needs is not there for it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// A job, as the caller numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct JobIndex(pub(crate) usize);

/// A worker, as the caller numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct WorkerId(pub(crate) usize);

/// What workers of one numerics have in common; a group has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NumericsId(pub(crate) usize);

/// What matters of a job.
#[derive(Debug, Clone)]
pub(crate) struct SchedulableJob {
    /// Different for each job.
    pub(crate) id: JobIndex,
    /// Higher ones come first.
    pub(crate) priority: i32,
    /// Orders jobs of one priority: lower is older. Different for each job.
    pub(crate) sequence: i64,
    /// Workers it needs; at least 1.
    pub(crate) min: usize,
    /// Workers it can use; at least `min`.
    pub(crate) max: usize,
    /// Where it stands.
    pub(crate) phase: JobPhase,
    /// Workers it may not use.
    pub(crate) excluded: Vec<WorkerId>,
    /// Bytes that each of its workers must have on a CPU; 0: not known.
    pub(crate) cpu_bytes: u64,
    /// The same on a GPU.
    pub(crate) gpu_bytes: u64,
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobPhase {
    /// It holds no workers and waits for its first group.
    Queued,
    /// It has begun.
    Started {
        /// Members that are alive and stay.
        held: usize,
        /// The numerics it is bound to: that of its members. `None` only if it holds none.
        numerics: Option<NumericsId>,
        /// It forms a group anew or waits to: it needs `min` members.
        wants_members: bool,
        /// More members may join, up to `max`.
        growable: bool,
    },
}

/// What matters of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SchedulableWorker {
    /// Different for each worker.
    pub(crate) id: WorkerId,
    /// Its numerics.
    pub(crate) numerics: NumericsId,
    /// Connected, without a job and not draining.
    pub(crate) free: bool,
    /// Alive and not draining: if it is not free, it could become so.
    pub(crate) is_available: bool,
    /// Bytes that a job may take there.
    pub(crate) memory: u64,
    /// They are a GPU's.
    pub(crate) gpu: bool,
}

/// Who gets whom, and what the others wait for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Schedule {
    /// Workers that jobs get now, beside those they hold; lower ids first.
    pub(crate) assign: Vec<(JobIndex, Vec<WorkerId>)>,
    /// Jobs that lack workers and get none, in the order they are served.
    pub(crate) waiting: Vec<(JobIndex, WaitReason)>,
}

/// What a job waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitReason {
    /// Even with every worker free it could not run.
    NotEnoughWorkers {
        /// Workers of one kind that it needs, those it holds included.
        needed: usize,
        /// How many there are of the most common kind, or of the kind it began with.
        exist_of_best_kind: usize,
        /// Kinds that it could run on.
        kinds: usize,
        /// Workers left out of these numbers because it may not use them.
        excluded: usize,
        /// Workers left out because they have too little memory.
        too_small: usize,
    },
    /// Every worker that it may use has too little memory.
    TooLarge {
        /// The most that one of them has, in bytes.
        limit: u64,
        /// That is a GPU's.
        gpu: bool,
    },
    /// Its workers are there, and other jobs have them.
    Busy {
        /// Workers of one kind that it needs beside those it holds.
        needed: usize,
        /// How many of the kind that it waits for are free.
        free: usize,
        /// How many there are of this kind, beside those it holds.
        exist: usize,
    },
    /// Another job that comes first waits for the same kind of workers.
    Behind {
        /// The first one that waits.
        job: JobIndex,
    },
}

impl WaitReason {
    /// The reason as people read it. `name` gives a job's name; `too_large` says why a worker with so many bytes, of a GPU or not, is
    /// too small.
    pub(crate) fn sentence(
        &self,
        name: impl Fn(JobIndex) -> String,
        too_large: impl Fn(u64, bool) -> String,
    ) -> String {
        match *self {
            Self::NotEnoughWorkers { needed, exist_of_best_kind, kinds, excluded, too_small } => {
                let there = match (exist_of_best_kind, kinds) {
                    (0, _) => "none is connected".to_owned(),
                    (n, 0 | 1) => format!("{n} {} connected", are(n)),
                    (n, kinds) => format!("of the {kinds} kinds connected none has more than {n}"),
                };
                let aside = match (excluded, too_small) {
                    (0, 0) => String::new(),
                    (n, 0) => format!(" ({n} that it may not use aside)"),
                    (0, n) => format!(" ({n} with too little memory aside)"),
                    (n, m) => format!(" ({n} that it may not use and {m} with too little memory aside)"),
                };
                format!("no set of workers can run it: it needs {needed} of one kind, {there}{aside}")
            }
            Self::TooLarge { limit, gpu } => too_large(limit, gpu),
            Self::Busy { needed, free, exist } => {
                let workers = if needed == 1 { "worker" } else { "workers" };
                let there = match free {
                    0 => format!("none of {exist} is free"),
                    n => format!("{n} of {exist} {} free", are(n)),
                };
                format!("waits for {needed} {workers}: {there}")
            }
            Self::Behind { job } => format!("waits behind job {}, which comes first", name(job)),
        }
    }
}

/// Gives free workers to jobs. The same views in another order give the same workers.
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

/// The jobs that lack workers, in the order they are served.
fn queue_order(jobs: &[SchedulableJob]) -> Vec<&SchedulableJob> {
    let mut lacking: Vec<&SchedulableJob> = jobs.iter().filter(|job| job.lacks_members()).collect();
    lacking.sort_by_key(|job| match job.phase {
        JobPhase::Started { .. } => (0, Reverse(0), job.sequence),
        JobPhase::Queued => (1, Reverse(job.priority), job.sequence),
    });
    lacking
}

/// The jobs that have begun, in the order they grow.
fn growth_order(jobs: &[SchedulableJob]) -> Vec<&SchedulableJob> {
    let mut begun: Vec<&SchedulableJob> = jobs.iter().filter(|job| job.phase != JobPhase::Queued).collect();
    begun.sort_by_key(|job| (Reverse(job.priority), job.sequence));
    begun
}

impl SchedulableJob {
    fn held(&self) -> usize {
        match self.phase {
            JobPhase::Queued => 0,
            JobPhase::Started { held, .. } => held,
        }
    }

    /// Workers it needs beside those it holds.
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
        matches!(self.phase, JobPhase::Started { growable: true, .. }) && self.needed() == 0
    }

    fn may_run_on(&self, numerics: NumericsId) -> bool {
        !matches!(self.phase, JobPhase::Started { numerics: Some(own), .. } if own != numerics)
    }

    /// Whether nothing but its memory can keep the job from a worker.
    fn is_eligible(&self, worker: &SchedulableWorker) -> bool {
        self.may_run_on(worker.numerics) && !self.excluded.contains(&worker.id)
    }

    fn fits(&self, worker: &SchedulableWorker) -> bool {
        worker.memory >= if worker.gpu { self.gpu_bytes } else { self.cpu_bytes }
    }

    fn may_use(&self, worker: &SchedulableWorker) -> bool {
        self.is_eligible(worker) && self.fits(worker)
    }
}

/// The workers, while they are given away.
struct WorkerPool<'a> {
    workers: &'a [SchedulableWorker],
    /// Free ones that no job has been given or has reserved.
    free: BTreeMap<WorkerId, &'a SchedulableWorker>,
    /// The first job that waits for workers of a kind.
    first_waiting: BTreeMap<NumericsId, JobIndex>,
    /// Kinds that a waiting job could run on once their workers are free.
    wanted: BTreeSet<NumericsId>,
}

impl<'a> WorkerPool<'a> {
    fn new(workers: &'a [SchedulableWorker]) -> Self {
        let free = workers.iter().filter(|w| w.free).map(|w| (w.id, w)).collect();
        Self { workers, free, first_waiting: BTreeMap::new(), wanted: BTreeSet::new() }
    }

    /// Gives `job` the workers it lacks, or reserves those that are free for it and says what it waits for.
    fn serve(&mut self, job: &SchedulableJob) -> Result<Vec<WorkerId>, WaitReason> {
        let free = count_kinds(job, self.free.values().copied());
        let enough = free.iter().filter(|(_, n)| **n >= job.needed());
        if let Some((numerics, n)) = enough.max_by_key(|(numerics, n)| (**n, Reverse(**numerics))) {
            let most = match job.phase {
                JobPhase::Queued => job.max,
                // What goes beyond its need is growth, which comes after the queue.
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
                return Err(match too_small().max_by_key(|w| (w.memory, w.gpu)) {
                    Some(largest) if best.is_none() => {
                        WaitReason::TooLarge { limit: largest.memory, gpu: largest.gpu }
                    }
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

    /// Gives a job that has begun, and has been given `members` just now, free workers that nobody waits for.
    fn grow(&mut self, job: &SchedulableJob, members: &[WorkerId]) -> Vec<WorkerId> {
        let room = job.max.saturating_sub(job.held() + members.len());
        let bound = self.workers.iter().find(|w| members.contains(&w.id)).map(|w| w.numerics);
        let free = count_kinds(job, self.free.values().copied());
        let open = free.iter().filter(|(numerics, _)| {
            !self.wanted.contains(numerics) && bound.is_none_or(|bound| bound == **numerics)
        });
        match open.max_by_key(|(numerics, n)| (**n, Reverse(**numerics))) {
            Some((numerics, n)) => self.take(job, *numerics, room.min(*n)),
            None => Vec::new(),
        }
    }

    /// Takes at most so many free workers of a kind that `job` may use.
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

/// Workers that `job` may use, by kind.
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
