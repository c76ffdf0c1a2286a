use proptest::prelude::*;

use super::*;

/// Free workers, one for each element of `kinds`.
fn free(kinds: &[usize]) -> Vec<SchedulableWorker> {
    let worker = |(id, numerics): (usize, &usize)| SchedulableWorker {
        id: WorkerId(id),
        numerics: NumericsId(*numerics),
        free: true,
        is_available: true,
        memory: DeviceMemory::new(DeviceKind::Cpu, None),
    };
    kinds.iter().enumerate().map(worker).collect()
}

fn busy(mut workers: Vec<SchedulableWorker>, ids: &[usize]) -> Vec<SchedulableWorker> {
    for id in ids {
        workers[*id].free = false;
    }
    workers
}

fn queued(id: usize, min: usize, max: usize) -> SchedulableJob {
    SchedulableJob {
        id: JobIndex(id),
        priority: 0,
        sequence: id as i64,
        min,
        max,
        phase: JobPhase::Queued,
        excluded: Vec::new(),
        cpu_bytes: 0,
        gpu_bytes: 0,
    }
}

fn recovering(id: usize, min: usize, max: usize, held: usize, numerics: Option<usize>) -> SchedulableJob {
    let numerics = numerics.map(NumericsId);
    let phase = JobPhase::Started { held, numerics, wants_members: true };
    SchedulableJob { phase, ..queued(id, min, max) }
}

fn running(id: usize, min: usize, max: usize, held: usize, numerics: usize) -> SchedulableJob {
    let numerics = Some(NumericsId(numerics));
    let phase = JobPhase::Started { held, numerics, wants_members: false };
    SchedulableJob { phase, ..queued(id, min, max) }
}

/// The assigned workers by job, and the reasons of the jobs that wait.
fn outcome(
    jobs: &[SchedulableJob],
    workers: &[SchedulableWorker],
) -> (Vec<(usize, Vec<usize>)>, Vec<String>) {
    let Schedule { assign, waiting } = schedule(jobs, workers);
    let assign = assign.into_iter().map(|(job, ids)| (job.0, ids.into_iter().map(|id| id.0).collect()));
    let sentence = |(job, reason): (JobIndex, WaitReason)| {
        let too_large = |memory: DeviceMemory| format!("more than {} bytes, {:?}", memory.bytes, memory.kind);
        format!("{} {}", job.0, reason.sentence(|job| format!("j{}", job.0), too_large))
    };
    (assign.collect(), waiting.into_iter().map(sentence).collect())
}

#[test]
fn a_job_uses_the_numerics_with_most_free_workers() {
    let (assign, waiting) = outcome(&[queued(0, 1, 2)], &free(&[0, 1, 1, 1]));
    assert_eq!(assign, [(0, vec![1, 2])]);
    assert!(waiting.is_empty());
    assert_eq!(
        outcome(&[queued(0, 2, 4)], &free(&[1, 0, 1, 0])).0,
        [(0, vec![1, 3])],
        "the kind with the lower number"
    );
}

#[test]
fn a_higher_priority_goes_first_and_then_the_older_job() {
    let urgent = SchedulableJob { priority: 5, ..queued(2, 1, 1) };
    let jobs = [queued(1, 1, 1), queued(0, 1, 1), urgent];
    let (assign, waiting) = outcome(&jobs, &free(&[0, 0]));
    assert_eq!(assign, [(0, vec![1]), (2, vec![0])]);
    assert_eq!(waiting, ["1 waits for 1 worker: none of 2 is free"]);
}

#[test]
fn a_waiting_job_is_not_starved_by_smaller_later_jobs() {
    let workers = busy(free(&[0, 0, 0]), &[1, 2]);
    let (assign, waiting) = outcome(&[queued(0, 2, 2), queued(1, 1, 1)], &workers);
    assert!(assign.is_empty());
    assert_eq!(waiting, ["0 waits for 2 workers: 1 of 3 is free", "1 waits for job j0, which comes first"]);
}

#[test]
fn a_job_that_cannot_run_blocks_no_other() {
    let jobs = [queued(0, 4, 4), queued(1, 1, 2)];
    let (assign, waiting) = outcome(&jobs, &free(&[0, 0, 1]));
    assert_eq!(assign, [(1, vec![0, 1])]);
    assert_eq!(waiting, ["0 waits for 4 workers of one kind: none of the 2 connected kinds has more than 2"]);
    let waiting = outcome(&jobs[..1], &free(&[0, 0])).1;
    assert_eq!(waiting, ["0 waits for 4 workers of one kind: 2 are connected"]);
    let waiting = outcome(&jobs[..1], &[]).1;
    assert_eq!(waiting, ["0 waits for 4 workers of one kind: none is connected"]);
}

#[test]
fn a_draining_worker_does_not_count() {
    let mut workers = free(&[0, 0]);
    (workers[1].free, workers[1].is_available) = (false, false);
    let waiting = outcome(&[queued(0, 2, 2)], &workers).1;
    assert_eq!(waiting, ["0 waits for 2 workers of one kind: 1 is connected"]);
}

#[test]
fn excluded_workers_serve_other_jobs() {
    let picky = SchedulableJob { excluded: vec![WorkerId(0)], ..queued(0, 2, 2) };
    let (assign, waiting) = outcome(&[picky, queued(1, 1, 1)], &free(&[0, 0]));
    assert_eq!(assign, [(1, vec![0])]);
    assert_eq!(
        waiting,
        ["0 waits for 2 workers of one kind: 1 is connected (not counting 1 that it may not use)"]
    );
}

#[test]
fn too_small_workers_serve_other_jobs() {
    let mut workers = free(&[0, 0, 0, 1]);
    let cpu = |bytes| DeviceMemory { kind: DeviceKind::Cpu, bytes };
    let gpu = |bytes| DeviceMemory { kind: DeviceKind::Gpu, bytes };
    for (worker, memory) in workers.iter_mut().zip([cpu(5), cpu(7), cpu(7), gpu(9)]) {
        worker.memory = memory;
    }
    let of = |cpu_bytes, gpu_bytes, job| SchedulableJob { cpu_bytes, gpu_bytes, ..job };
    let (assign, waiting) = outcome(&[of(7, 10, queued(0, 1, 3)), queued(1, 1, 1)], &workers);
    assert_eq!(
        (assign, waiting.len()),
        (vec![(0, vec![1, 2]), (1, vec![0])], 0),
        "each job uses workers that are large enough"
    );
    assert_eq!(outcome(&[of(8, 9, queued(0, 1, 1))], &workers).0, [(0, vec![3])], "only the GPU has enough");

    let (assign, waiting) = outcome(&[of(8, 10, queued(0, 1, 1)), queued(1, 3, 3)], &workers);
    assert_eq!(assign, [(1, vec![0, 1, 2])], "it blocks no other job");
    assert_eq!(waiting, ["0 waits for a worker with more memory: more than 9 bytes, Gpu"]);
    let waiting = outcome(&[of(8, 10, queued(0, 1, 1))], &busy(workers.clone(), &[0, 1, 2, 3])).1;
    assert_eq!(
        waiting,
        ["0 waits for a worker with more memory: more than 9 bytes, Gpu"],
        "also while they are busy"
    );
    let waiting = outcome(&[of(8, 10, queued(0, 1, 1))], &[]).1;
    assert_eq!(waiting, ["0 waits for 1 worker: none is connected"]);
    let waiting = outcome(&[of(7, 10, queued(0, 3, 3))], &workers).1;
    assert_eq!(
        waiting,
        ["0 waits for 3 workers of one kind: 2 are connected (not counting 2 with too little memory)"]
    );
    // A job that runs on the first kind does not grow onto workers that are too small.
    let grown = of(7, 0, running(0, 1, 4, 1, 0));
    assert_eq!(outcome(&[grown], &busy(workers, &[1])).0, [(0, vec![2])]);
}

#[test]
fn started_jobs_come_first_and_keep_their_numerics() {
    let jobs = [SchedulableJob { priority: 9, ..queued(0, 2, 4) }, recovering(1, 2, 4, 1, Some(1))];
    let workers = busy(free(&[0, 1, 1, 1, 1]), &[4]);
    assert_eq!(
        outcome(&jobs, &workers).0,
        [(0, vec![2, 3]), (1, vec![1])],
        "first its minimum, then the queue"
    );
}

#[test]
fn a_job_that_lost_all_members_takes_any_kind_and_grows_after_the_queue() {
    let workers = free(&[0, 1, 1, 1]);
    let (assign, _) = outcome(&[recovering(0, 1, 2, 0, None), queued(1, 1, 1)], &workers);
    assert_eq!(assign, [(0, vec![1, 3]), (1, vec![2])]);
}

#[test]
fn a_started_job_waits_for_its_own_numerics() {
    let workers = busy(free(&[0, 0, 1, 1]), &[0, 1]);
    let waiting = outcome(&[recovering(0, 2, 2, 1, Some(0))], &workers).1;
    assert_eq!(waiting, ["0 waits for 1 worker: none of 1 is free"]);
    let waiting = outcome(&[recovering(0, 3, 3, 1, Some(0))], &workers).1;
    assert_eq!(waiting, ["0 waits for 3 workers of one kind: 2 are connected"]);
}

#[test]
fn running_jobs_grow_last() {
    let workers = busy(free(&[0, 0, 0, 0]), &[0]);
    let grown = running(0, 1, 4, 1, 0);
    assert_eq!(outcome(std::slice::from_ref(&grown), &workers).0, [(0, vec![1, 2, 3])]);
    assert_eq!(outcome(&[grown.clone(), queued(1, 2, 2)], &workers).0, [(0, vec![3]), (1, vec![1, 2])]);
    let four = queued(1, 4, 4);
    assert!(outcome(&[grown.clone(), four], &workers).0.is_empty(), "the free workers are reserved");
    let five = queued(1, 5, 5);
    assert_eq!(outcome(&[grown, five], &workers).0, [(0, vec![1, 2, 3])], "it cannot run anyway");
}

#[test]
fn no_job_grows_onto_a_kind_that_a_waiting_job_could_run_on() {
    // The waiting job reserves the more common kind 0, and could also run on kind 1 when its busy
    // worker is free.
    let workers = busy(free(&[0, 0, 0, 1, 1]), &[0, 1, 2, 3]);
    let jobs = [running(0, 1, 2, 1, 1), queued(1, 2, 2)];
    let (assign, waiting) = outcome(&jobs, &workers);
    assert!(assign.is_empty());
    assert_eq!(waiting, ["1 waits for 2 workers: none of 3 is free"]);
}

/// Priority, age, minimum of workers, maximum less minimum, flags (started, wants
/// members), exclusions, and bytes needed on a CPU and on a GPU.
type JobSeed = (i32, i16, usize, usize, [bool; 2], u16, (u64, u64));

/// Consistent jobs and workers: each busy worker belongs to one of the jobs, or to a job that is
/// not scheduled.
fn jobs_and_workers() -> impl Strategy<Value = (Vec<SchedulableJob>, Vec<SchedulableWorker>)> {
    let bytes = prop::sample::select(vec![0, 0, 1, 2, 3]);
    let bytes = (bytes.clone(), bytes);
    let job = (-1..2_i32, any::<i16>(), 1..5_usize, 0..4_usize, any::<[bool; 2]>(), any::<u16>(), bytes);
    let memory = prop::sample::select(vec![1, 2, 3, u64::MAX]);
    let worker = (0..3_usize, 0..12_usize, memory);
    (prop::collection::vec(job, 0..7), prop::collection::vec(worker, 0..14)).prop_map(|(jobs, workers)| {
        let mut held = vec![Vec::new(); jobs.len()];
        let mut views = Vec::new();
        for (id, (numerics, at, memory)) in workers.into_iter().enumerate() {
            let (free, is_available) = (at < 5, at != 5);
            let kind = if numerics == 2 { DeviceKind::Gpu } else { DeviceKind::Cpu };
            views.push(SchedulableWorker {
                id: WorkerId(id),
                numerics: NumericsId(numerics),
                free,
                is_available,
                memory: DeviceMemory { bytes: memory, kind },
            });
            if let Some(holder) = at.checked_sub(6).and_then(|slot| held.get_mut(slot))
                && holder.first().is_none_or(|first: &usize| views[*first].numerics == NumericsId(numerics))
            {
                holder.push(id);
            }
        }
        let view = |(i, (priority, age, min, more, flags, excluded, bytes)): (usize, JobSeed)| {
            // The job's members have enough memory for it.
            let most = held[i].iter().map(|id| views[*id].memory.bytes).min().unwrap_or(u64::MAX);
            let [started, wants_members] = flags;
            let numerics = held[i].first().map(|id| views[*id].numerics);
            let phase = match numerics.is_some() || (started && wants_members) {
                true => JobPhase::Started { held: held[i].len(), numerics, wants_members },
                false => JobPhase::Queued,
            };
            // About one worker in four, in about one job in four.
            let excluded =
                (0..views.len()).filter(|id| excluded & 3 == 0 && id % 4 == usize::from(excluded % 4));
            SchedulableJob {
                id: JobIndex(i),
                priority,
                sequence: i64::from(age) * 8 + i as i64,
                min,
                max: (min + more).max(held[i].len()),
                phase,
                excluded: excluded.filter(|id| !held[i].contains(id)).map(WorkerId).collect(),
                cpu_bytes: bytes.0.min(most),
                gpu_bytes: bytes.1.min(most),
            }
        };
        let jobs = jobs.into_iter().enumerate().map(view).collect();
        (jobs, views)
    })
}

/// A schedule with its inputs, for the checks of its post-conditions.
struct Checked {
    jobs: Vec<SchedulableJob>,
    workers: Vec<SchedulableWorker>,
    assign: BTreeMap<JobIndex, Vec<WorkerId>>,
    waiting: BTreeMap<JobIndex, WaitReason>,
}

impl Checked {
    fn new((jobs, workers): (Vec<SchedulableJob>, Vec<SchedulableWorker>)) -> Self {
        let Schedule { assign, waiting } = schedule(&jobs, &workers);
        Self { jobs, workers, assign: assign.into_iter().collect(), waiting: waiting.into_iter().collect() }
    }

    fn held(job: &SchedulableJob) -> usize {
        if let JobPhase::Started { held, .. } = job.phase { held } else { 0 }
    }

    fn given(&self, job: &SchedulableJob) -> &[WorkerId] {
        self.assign.get(&job.id).map_or(&[], Vec::as_slice)
    }

    fn usable(job: &SchedulableJob, worker: &SchedulableWorker) -> bool {
        Self::allowed(job, worker) && Self::large_enough(job, worker)
    }

    fn allowed(job: &SchedulableJob, worker: &SchedulableWorker) -> bool {
        let bound = if let JobPhase::Started { numerics, .. } = job.phase { numerics } else { None };
        bound.is_none_or(|numerics| numerics == worker.numerics) && !job.excluded.contains(&worker.id)
    }

    fn large_enough(job: &SchedulableJob, worker: &SchedulableWorker) -> bool {
        match worker.memory.kind {
            DeviceKind::Gpu => worker.memory.bytes >= job.gpu_bytes,
            DeviceKind::Cpu => worker.memory.bytes >= job.cpu_bytes,
        }
    }

    /// The number of workers of the kind `numerics` that the job may use and that fulfil
    /// `condition`.
    fn count(
        &self,
        job: &SchedulableJob,
        numerics: NumericsId,
        condition: impl Fn(&SchedulableWorker) -> bool,
    ) -> usize {
        let fits = |w: &&SchedulableWorker| w.numerics == numerics && Self::usable(job, w) && condition(w);
        self.workers.iter().filter(fits).count()
    }

    /// The kinds that could run the job if all their workers were free, the most common kind first.
    fn could_run_on(&self, job: &SchedulableJob) -> Vec<NumericsId> {
        let mut kinds: Vec<_> = (0..3).map(NumericsId).collect();
        kinds.sort_by_key(|numerics| Reverse(self.count(job, *numerics, |w| w.is_available)));
        kinds.retain(|numerics| self.count(job, *numerics, |w| w.is_available) >= job.min);
        kinds
    }

    fn lacks(job: &SchedulableJob) -> bool {
        match job.phase {
            JobPhase::Queued => true,
            JobPhase::Started { held, wants_members, .. } => wants_members && held < job.min,
        }
    }

    fn queue_key(job: &SchedulableJob) -> (bool, Reverse<i32>, i64) {
        (job.phase == JobPhase::Queued, Reverse(job.priority), job.sequence)
    }

    /// The jobs that lack workers and are served before `job`.
    fn before(&self, job: &SchedulableJob) -> impl Iterator<Item = &SchedulableJob> {
        self.jobs
            .iter()
            .filter(move |other| Self::lacks(other) && Self::queue_key(other) < Self::queue_key(job))
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: 1000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn assigned_workers_are_free_distinct_and_of_one_kind(case in jobs_and_workers()) {
        let it = Checked::new(case);
        let mut seen = BTreeSet::new();
        for job in &it.jobs {
            let kinds: BTreeSet<_> = it.given(job).iter().map(|id| it.workers[id.0].numerics).collect();
            prop_assert!(kinds.len() <= 1, "{kinds:?}");
            for id in it.given(job) {
                let worker = &it.workers[id.0];
                prop_assert!(seen.insert(*id), "{id:?} is assigned twice");
                prop_assert!(worker.free && Checked::usable(job, worker), "{worker:?} for {job:?}");
            }
        }
    }

    #[test]
    fn a_job_gets_its_minimum_or_nothing_and_never_too_many(case in jobs_and_workers()) {
        let it = Checked::new(case);
        for job in &it.jobs {
            let (new, held) = (it.given(job).len(), Checked::held(job));
            prop_assert!(new == 0 || (job.min..=job.max).contains(&(held + new)), "{new} for {job:?}");
            prop_assert_eq!(it.waiting.contains_key(&job.id), Checked::lacks(job) && new == 0);
            if let JobPhase::Started { wants_members, .. } = job.phase {
                let may_get = held >= job.min || wants_members;
                prop_assert!(may_get || new == 0, "{job:?} may not get members");
            }
        }
    }

    #[test]
    fn jobs_are_served_in_order(case in jobs_and_workers()) {
        let it = Checked::new(case);
        for waiting in it.jobs.iter().filter(|job| it.waiting.contains_key(&job.id)) {
            let Some(numerics) = it.could_run_on(waiting).first().copied() else { continue };
            let later = it.jobs.iter().filter(|job| {
                !Checked::lacks(job) || Checked::queue_key(job) > Checked::queue_key(waiting)
            });
            for worker in later.flat_map(|job| it.given(job)).map(|id| &it.workers[id.0]) {
                let wanted = worker.numerics == numerics && Checked::usable(waiting, worker);
                prop_assert!(!wanted, "{worker:?} taken from {waiting:?}");
            }
        }
    }

    #[test]
    fn a_job_waits_only_if_no_placement_exists(case in jobs_and_workers()) {
        let it = Checked::new(case);
        for job in it.jobs.iter().filter(|job| it.waiting.contains_key(&job.id)) {
            // The workers that earlier jobs were assigned or have reserved.
            let taken: BTreeSet<_> = it.before(job).flat_map(|other| it.given(other)).collect();
            let reserved = |w: &SchedulableWorker| it.before(job).any(|other| {
                it.waiting.contains_key(&other.id)
                    && it.could_run_on(other).first() == Some(&w.numerics)
                    && Checked::usable(other, w)
            });
            for numerics in (0..3).map(NumericsId) {
                let left = it.count(job, numerics, |w| w.free && !taken.contains(&w.id) && !reserved(w));
                let needed = job.min - Checked::held(job);
                prop_assert!(left < needed, "{left} of {numerics:?} are left for {job:?}");
            }
        }
    }

    #[test]
    fn wait_reasons_are_correct(case in jobs_and_workers()) {
        let it = Checked::new(case);
        for job in it.jobs.iter().filter(|job| it.waiting.contains_key(&job.id)) {
            let kinds = it.could_run_on(job);
            match it.waiting[&job.id] {
                WaitReason::NotEnoughWorkers { needed, exist_of_best_kind, too_small, .. } => {
                    prop_assert!(kinds.is_empty() && needed > exist_of_best_kind, "{job:?}");
                    let mut allowed =
                        it.workers.iter().filter(|w| w.is_available && Checked::allowed(job, w));
                    let is_small = |w: &SchedulableWorker| !Checked::large_enough(job, w);
                    prop_assert_eq!(too_small, allowed.clone().filter(|w| is_small(w)).count());
                    prop_assert!(too_small == 0 || !allowed.all(is_small), "{job:?} is too large for all");
                }
                WaitReason::TooLarge { largest } => {
                    let allowed: Vec<_> =
                        it.workers.iter().filter(|w| w.is_available && Checked::allowed(job, w)).collect();
                    prop_assert!(allowed.iter().all(|w| !Checked::large_enough(job, w)), "{job:?}");
                    prop_assert!(allowed.iter().any(|w| w.memory == largest), "{job:?}");
                    prop_assert!(allowed.iter().all(|w| w.memory <= largest), "{job:?}");
                }
                WaitReason::Busy { needed, free, exist } => {
                    prop_assert!(!kinds.is_empty() && free < needed && needed <= exist, "{job:?}");
                }
                WaitReason::Behind { job: first } => {
                    prop_assert!(!kinds.is_empty());
                    let first = it.before(job).find(|other| other.id == first);
                    let first = first.expect("it comes before");
                    prop_assert!(it.waiting.contains_key(&first.id));
                    prop_assert_eq!(it.could_run_on(first)[0], kinds[0]);
                }
            }
        }
    }

    #[test]
    fn a_job_that_cannot_run_changes_nothing_for_others(case in jobs_and_workers()) {
        let it = Checked::new(case);
        let cannot_run = |reason: &WaitReason| {
            matches!(reason, WaitReason::NotEnoughWorkers { .. } | WaitReason::TooLarge { .. })
        };
        let impossible: Vec<_> = it.waiting.iter()
            .filter(|(_, reason)| cannot_run(reason))
            .map(|(job, _)| *job)
            .collect();
        let possible: Vec<_> = it.jobs.iter().filter(|job| !impossible.contains(&job.id)).cloned().collect();
        let without = Checked::new((possible, it.workers.clone()));
        prop_assert_eq!(&without.assign, &it.assign);
        for (job, reason) in without.waiting {
            prop_assert_eq!(it.waiting[&job], reason);
        }
    }

    #[test]
    fn minimums_come_before_growth(case in jobs_and_workers()) {
        let it = Checked::new(case);
        let grown = it.jobs.iter().filter(|job| {
            let new = it.given(job).len();
            job.phase != JobPhase::Queued && new > 0 && Checked::held(job) + new > job.min
        });
        for job in grown {
            let numerics = it.workers[it.given(job)[0].0].numerics;
            for waiting in it.jobs.iter().filter(|job| it.waiting.contains_key(&job.id)) {
                let could_run = it.could_run_on(waiting).contains(&numerics);
                prop_assert!(!could_run, "{job:?} grew before {waiting:?}");
            }
        }
    }

    #[test]
    fn the_order_of_jobs_and_workers_does_not_matter(case in jobs_and_workers(), turn in 0..7_usize) {
        let (mut jobs, mut workers) = case;
        let expected = schedule(&jobs, &workers);
        workers.reverse();
        let turn = turn % jobs.len().max(1);
        jobs.rotate_left(turn);
        prop_assert_eq!(schedule(&jobs, &workers), expected);
    }
}
