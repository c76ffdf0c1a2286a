use proptest::prelude::*;

use super::*;

/// Free workers, one for each kind named.
fn free(kinds: &[usize]) -> Vec<SchedulableWorker> {
    let worker = |(id, numerics): (usize, &usize)| SchedulableWorker {
        id: WorkerId(id),
        numerics: NumericsId(*numerics),
        free: true,
        is_available: true,
        memory: u64::MAX,
        gpu: false,
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
    let phase = JobPhase::Started { held, numerics, wants_members: true, growable: false };
    SchedulableJob { phase, ..queued(id, min, max) }
}

fn running(id: usize, min: usize, max: usize, held: usize, numerics: usize) -> SchedulableJob {
    let numerics = Some(NumericsId(numerics));
    let phase = JobPhase::Started { held, numerics, wants_members: false, growable: true };
    SchedulableJob { phase, ..queued(id, min, max) }
}

/// Workers by job, and the sentences of those who wait.
fn outcome(
    jobs: &[SchedulableJob],
    workers: &[SchedulableWorker],
) -> (Vec<(usize, Vec<usize>)>, Vec<String>) {
    let Schedule { assign, waiting } = schedule(jobs, workers);
    let assign = assign.into_iter().map(|(job, ids)| (job.0, ids.into_iter().map(|id| id.0).collect()));
    let sentence = |(job, reason): (JobIndex, WaitReason)| {
        let too_large = |limit, gpu| format!("is too large for {limit} bytes, gpu: {gpu}");
        format!("{} {}", job.0, reason.sentence(|job| format!("j{}", job.0), too_large))
    };
    (assign.collect(), waiting.into_iter().map(sentence).collect())
}

#[test]
fn a_job_uses_the_numerics_with_most_free_workers() {
    let (assign, waiting) = outcome(&[queued(0, 1, 2)], &free(&[0, 1, 1, 1]));
    assert_eq!(assign, [(0, vec![1, 2])]);
    assert!(waiting.is_empty());
    assert_eq!(outcome(&[queued(0, 2, 4)], &free(&[1, 0, 1, 0])).0, [(0, vec![1, 3])], "the lower kind");
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
fn a_waiting_job_is_not_starved_by_smaller_ones_behind_it() {
    let workers = busy(free(&[0, 0, 0]), &[1, 2]);
    let (assign, waiting) = outcome(&[queued(0, 2, 2), queued(1, 1, 1)], &workers);
    assert!(assign.is_empty());
    assert_eq!(
        waiting,
        ["0 waits for 2 workers: 1 of 3 is free", "1 waits behind job j0, which comes first"]
    );
}

#[test]
fn a_job_that_cannot_run_blocks_nobody() {
    let jobs = [queued(0, 4, 4), queued(1, 1, 2)];
    let (assign, waiting) = outcome(&jobs, &free(&[0, 0, 1]));
    assert_eq!(assign, [(1, vec![0, 1])]);
    assert_eq!(
        waiting,
        ["0 no set of workers can run it: it needs 4 of one kind, \
          of the 2 kinds connected none has more than 2"]
    );
    let waiting = outcome(&jobs[..1], &free(&[0, 0])).1;
    assert_eq!(waiting, ["0 no set of workers can run it: it needs 4 of one kind, 2 are connected"]);
    let waiting = outcome(&jobs[..1], &[]).1;
    assert_eq!(waiting, ["0 no set of workers can run it: it needs 4 of one kind, none is connected"]);
}

#[test]
fn a_draining_worker_does_not_count() {
    let mut workers = free(&[0, 0]);
    (workers[1].free, workers[1].is_available) = (false, false);
    let waiting = outcome(&[queued(0, 2, 2)], &workers).1;
    assert_eq!(waiting, ["0 no set of workers can run it: it needs 2 of one kind, 1 is connected"]);
}

#[test]
fn excluded_workers_serve_other_jobs() {
    let picky = SchedulableJob { excluded: vec![WorkerId(0)], ..queued(0, 2, 2) };
    let (assign, waiting) = outcome(&[picky, queued(1, 1, 1)], &free(&[0, 0]));
    assert_eq!(assign, [(1, vec![0])]);
    assert_eq!(
        waiting,
        [
            "0 no set of workers can run it: it needs 2 of one kind, 1 is connected (1 that it may not use aside)"
        ]
    );
}

#[test]
fn too_small_workers_serve_other_jobs() {
    let mut workers = free(&[0, 0, 0, 1]);
    for (worker, (memory, gpu)) in workers.iter_mut().zip([(5, false), (7, false), (7, false), (9, true)]) {
        (worker.memory, worker.gpu) = (memory, gpu);
    }
    let of = |cpu_bytes, gpu_bytes, job| SchedulableJob { cpu_bytes, gpu_bytes, ..job };
    let (assign, waiting) = outcome(&[of(7, 10, queued(0, 1, 3)), queued(1, 1, 1)], &workers);
    assert_eq!((assign, waiting.len()), (vec![(0, vec![1, 2]), (1, vec![0])], 0), "each takes what it can");
    assert_eq!(outcome(&[of(8, 9, queued(0, 1, 1))], &workers).0, [(0, vec![3])], "only the GPU has enough");

    let (assign, waiting) = outcome(&[of(8, 10, queued(0, 1, 1)), queued(1, 3, 3)], &workers);
    assert_eq!(assign, [(1, vec![0, 1, 2])], "it blocks nobody");
    assert_eq!(waiting, ["0 is too large for 9 bytes, gpu: true"]);
    let waiting = outcome(&[of(8, 10, queued(0, 1, 1))], &busy(workers.clone(), &[0, 1, 2, 3])).1;
    assert_eq!(waiting, ["0 is too large for 9 bytes, gpu: true"], "also while they are busy");
    let waiting = outcome(&[of(8, 10, queued(0, 1, 1))], &[]).1;
    assert_eq!(waiting, ["0 no set of workers can run it: it needs 1 of one kind, none is connected"]);
    let waiting = outcome(&[of(7, 10, queued(0, 3, 3))], &workers).1;
    assert_eq!(
        waiting,
        [
            "0 no set of workers can run it: it needs 3 of one kind, 2 are connected (2 with too little memory aside)"
        ]
    );
    // One that runs on the first kind does not grow into what is too small there.
    let grown = of(7, 0, running(0, 1, 4, 1, 0));
    assert_eq!(outcome(&[grown], &busy(workers, &[1])).0, [(0, vec![2])]);
}

#[test]
fn started_jobs_come_first_and_keep_their_numerics() {
    let jobs = [SchedulableJob { priority: 9, ..queued(0, 2, 4) }, recovering(1, 2, 4, 1, Some(1))];
    let workers = busy(free(&[0, 1, 1, 1, 1]), &[4]);
    assert_eq!(outcome(&jobs, &workers).0, [(0, vec![2, 3]), (1, vec![1])], "its need, then the queue");
}

#[test]
fn a_job_that_lost_all_members_takes_any_kind_and_grows_with_what_is_left() {
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
    assert_eq!(waiting, ["0 no set of workers can run it: it needs 3 of one kind, 2 are connected"]);
}

#[test]
fn running_jobs_grow_last() {
    let workers = busy(free(&[0, 0, 0, 0]), &[0]);
    let grown = running(0, 1, 4, 1, 0);
    assert_eq!(outcome(std::slice::from_ref(&grown), &workers).0, [(0, vec![1, 2, 3])]);
    assert_eq!(outcome(&[grown.clone(), queued(1, 2, 2)], &workers).0, [(0, vec![3]), (1, vec![1, 2])]);
    let four = queued(1, 4, 4);
    assert!(outcome(&[grown.clone(), four], &workers).0.is_empty(), "they are reserved");
    let five = queued(1, 5, 5);
    assert_eq!(outcome(&[grown, five], &workers).0, [(0, vec![1, 2, 3])], "it cannot run anyway");
}

#[test]
fn no_job_grows_into_a_kind_that_a_waiting_one_could_run_on() {
    // It reserves the larger kind, 0, and kind 1 would do as well once its busy worker is free.
    let workers = busy(free(&[0, 0, 0, 1, 1]), &[0, 1, 2, 3]);
    let jobs = [running(0, 1, 2, 1, 1), queued(1, 2, 2)];
    let (assign, waiting) = outcome(&jobs, &workers);
    assert!(assign.is_empty());
    assert_eq!(waiting, ["1 waits for 2 workers: none of 3 is free"]);
}

/// Priority, age, the fewest workers and how many more, flags, exclusions, and bytes on a CPU and on a GPU.
type JobSeed = (i32, i16, usize, usize, [bool; 3], u16, (u64, u64));

/// Jobs and workers that could stand like this: each busy worker is held by a job, or by one that is not looked at.
fn jobs_and_workers() -> impl Strategy<Value = (Vec<SchedulableJob>, Vec<SchedulableWorker>)> {
    let bytes = prop::sample::select(vec![0, 0, 1, 2, 3]);
    let bytes = (bytes.clone(), bytes);
    let job = (-1..2_i32, any::<i16>(), 1..5_usize, 0..4_usize, any::<[bool; 3]>(), any::<u16>(), bytes);
    let memory = prop::sample::select(vec![1, 2, 3, u64::MAX]);
    let worker = (0..3_usize, 0..12_usize, memory);
    (prop::collection::vec(job, 0..7), prop::collection::vec(worker, 0..14)).prop_map(|(jobs, workers)| {
        let mut held = vec![Vec::new(); jobs.len()];
        let mut views = Vec::new();
        for (id, (numerics, at, memory)) in workers.into_iter().enumerate() {
            let (free, is_available, gpu) = (at < 5, at != 5, numerics == 2);
            views.push(SchedulableWorker {
                id: WorkerId(id),
                numerics: NumericsId(numerics),
                free,
                is_available,
                memory,
                gpu,
            });
            if let Some(holder) = at.checked_sub(6).and_then(|slot| held.get_mut(slot))
                && holder.first().is_none_or(|first: &usize| views[*first].numerics == NumericsId(numerics))
            {
                holder.push(id);
            }
        }
        let view = |(i, (priority, age, min, more, flags, excluded, bytes)): (usize, JobSeed)| {
            // What it holds it could be given.
            let most = held[i].iter().map(|id| views[*id].memory).min().unwrap_or(u64::MAX);
            let [begun, wants_members, growable] = flags;
            let numerics = held[i].first().map(|id| views[*id].numerics);
            let phase = match numerics.is_some() || (begun && wants_members) {
                true => JobPhase::Started { held: held[i].len(), numerics, wants_members, growable },
                false => JobPhase::Queued,
            };
            // About one worker in four.
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

/// A schedule, to be asked about what it must fulfil.
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
        match worker.gpu {
            true => worker.memory >= job.gpu_bytes,
            false => worker.memory >= job.cpu_bytes,
        }
    }

    /// How many workers of `numerics` that the job may use fulfil `condition`.
    fn count(
        &self,
        job: &SchedulableJob,
        numerics: NumericsId,
        condition: impl Fn(&SchedulableWorker) -> bool,
    ) -> usize {
        let fits = |w: &&SchedulableWorker| w.numerics == numerics && Self::usable(job, w) && condition(w);
        self.workers.iter().filter(fits).count()
    }

    /// Kinds that could run the job if all their workers were free, the most common first.
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

    fn place(job: &SchedulableJob) -> (bool, Reverse<i32>, i64) {
        match job.phase {
            JobPhase::Started { .. } => (false, Reverse(0), job.sequence),
            JobPhase::Queued => (true, Reverse(job.priority), job.sequence),
        }
    }

    /// Jobs that lack workers and come before `job`.
    fn before(&self, job: &SchedulableJob) -> impl Iterator<Item = &SchedulableJob> {
        self.jobs.iter().filter(move |other| Self::lacks(other) && Self::place(other) < Self::place(job))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn workers_are_free_given_once_and_of_one_kind(case in jobs_and_workers()) {
        let it = Checked::new(case);
        let mut seen = BTreeSet::new();
        for job in &it.jobs {
            let kinds: BTreeSet<_> = it.given(job).iter().map(|id| it.workers[id.0].numerics).collect();
            prop_assert!(kinds.len() <= 1, "{kinds:?}");
            for id in it.given(job) {
                let worker = &it.workers[id.0];
                prop_assert!(seen.insert(*id), "{id:?} is given twice");
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
            if let JobPhase::Started { growable, wants_members, .. } = job.phase {
                let may_get = growable || (wants_members && held < job.min);
                prop_assert!(may_get || new == 0, "{job:?} was left alone");
            }
        }
    }

    #[test]
    fn jobs_are_served_in_order(case in jobs_and_workers()) {
        let it = Checked::new(case);
        for waiting in it.jobs.iter().filter(|job| it.waiting.contains_key(&job.id)) {
            let Some(numerics) = it.could_run_on(waiting).first().copied() else { continue };
            let later = it.jobs.iter().filter(|job| {
                !Checked::lacks(job) || Checked::place(job) > Checked::place(waiting)
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
            // What others before it have, by need or by reservation.
            let taken: BTreeSet<_> = it.before(job).flat_map(|other| it.given(other)).collect();
            let reserved = |w: &SchedulableWorker| it.before(job).any(|other| {
                it.waiting.contains_key(&other.id)
                    && it.could_run_on(other).first() == Some(&w.numerics)
                    && Checked::usable(other, w)
            });
            for numerics in (0..3).map(NumericsId) {
                let left = it.count(job, numerics, |w| w.free && !taken.contains(&w.id) && !reserved(w));
                prop_assert!(left < job.min - Checked::held(job), "{left} of {numerics:?} are left for {job:?}");
            }
        }
    }

    #[test]
    fn reasons_are_true(case in jobs_and_workers()) {
        let it = Checked::new(case);
        for job in it.jobs.iter().filter(|job| it.waiting.contains_key(&job.id)) {
            let kinds = it.could_run_on(job);
            match it.waiting[&job.id] {
                WaitReason::NotEnoughWorkers { needed, exist_of_best_kind, too_small, .. } => {
                    prop_assert!(kinds.is_empty() && needed > exist_of_best_kind, "{job:?}");
                    let mut there = it.workers.iter().filter(|w| w.is_available && Checked::allowed(job, w));
                    let hopeless = |w: &SchedulableWorker| !Checked::large_enough(job, w);
                    prop_assert_eq!(too_small, there.clone().filter(|w| hopeless(w)).count());
                    prop_assert!(too_small == 0 || !there.all(hopeless), "{job:?} is too large for all");
                }
                WaitReason::TooLarge { limit, gpu } => {
                    let there: Vec<_> =
                        it.workers.iter().filter(|w| w.is_available && Checked::allowed(job, w)).collect();
                    prop_assert!(there.iter().all(|w| !Checked::large_enough(job, w)), "{job:?}");
                    prop_assert!(there.iter().any(|w| (w.memory, w.gpu) == (limit, gpu)), "{job:?}");
                    prop_assert!(there.iter().all(|w| w.memory <= limit), "{job:?}");
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
        let impossible: Vec<_> = it.waiting.iter()
            .filter(|(_, reason)| matches!(reason, WaitReason::NotEnoughWorkers { .. } | WaitReason::TooLarge { .. }))
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
                prop_assert!(!it.could_run_on(waiting).contains(&numerics), "{job:?} grew before {waiting:?}");
            }
        }
    }

    #[test]
    fn the_order_of_the_views_does_not_matter(case in jobs_and_workers(), turn in 0..7_usize) {
        let (mut jobs, mut workers) = case;
        let expected = schedule(&jobs, &workers);
        workers.reverse();
        let turn = turn % jobs.len().max(1);
        jobs.rotate_left(turn);
        prop_assert_eq!(schedule(&jobs, &workers), expected);
    }
}
