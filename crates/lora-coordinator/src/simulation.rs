//! Property tests of the control of jobs: two jobs, five simulated workers, and random pauses,
//! drains, losses, faults of workers, joins, cut connections, restarts of the coordinator, and
//! failures of the store. The real decisions are applied in memory; nothing else of the coordinator
//! runs.
//!
//! Safety, after every action: a group never starts behind a state that a connected member held,
//! and no state is given up that is not in the store; a job is cancelled only when no member holds
//! it whose lease has not expired. Liveness: when the faults end, both jobs succeed, or are
//! cancelled if a user asked for it.

mod event;
mod process;

use std::collections::BTreeMap;
use std::time::Duration;

use lora_proto::v1::{self, Fault, Goal, Phase, job_event};
use lora_spec::{JobSpec, JobState};
use proptest::prelude::*;
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::event::{Event, events};
use self::process::Process;
use crate::config::RecoveryConfig;
use crate::control::action::Action;
use crate::control::group::GroupPhase;
use crate::control::job::{GroupMaterial, Job};
use crate::control::member::{MemberState, observe};
use crate::control::reconcile::{Circumstances, gives_way, has_substitute, reconcile};
use crate::control::request::{Answer, Request};
use crate::control::workers::{Outbox, Workers, has_state};
use crate::scheduler::schedule;
use crate::store::{JobRow, Recorded};

/// Steps of each job.
const TOTAL_STEPS: u64 = 8;
const WORKERS: usize = 5;
/// What each worker reports to be at fault.
const LOCAL_FAULTS: [Fault; WORKERS] = [Fault::Disk, Fault::Base, Fault::Fetch, Fault::Memory, Fault::Engine];
const LEASE: Duration = Duration::from_secs(2);
/// Time between two rounds of the coordinator.
const ROUND: Duration = Duration::from_millis(300);
/// Rounds within which both jobs must succeed when the faults have ended. Members that wait for a
/// group that cannot form give up after 20 s, which is 67 rounds.
const ROUNDS_TO_SUCCEED: usize = 600;

struct World {
    workers: Workers,
    processes: Vec<Process>,
    jobs: BTreeMap<String, Job>,
    /// Jobs that are paused or have ended.
    stopped: BTreeMap<String, JobRow>,
    /// The step of the newest checkpoint in the store, by job.
    checkpoints: BTreeMap<String, u64>,
    recovery: RecoveryConfig,
    store_fails: bool,
}

impl World {
    fn new() -> Self {
        let job = |(id, priority): (&str, i32)| {
            let mut spec = JobSpec { name: id.to_owned(), ..JobSpec::default() };
            (spec.workers.min, spec.workers.max) = (2, 3);
            let row = JobRow {
                id: id.to_owned(),
                sequence: 1 + i64::from(id == "b"),
                priority,
                spec: v1::JobSpec::try_from(&spec).unwrap(),
                state: JobState::Queued,
                validated: true,
                ..JobRow::default()
            };
            (id.to_owned(), Job::new(row, None, &Recorded::default()).unwrap())
        };
        let recovery = RecoveryConfig {
            settle_seconds: 0.5,
            fruitless_generations: u32::MAX,
            forming_seconds: 20.0,
            ..RecoveryConfig::default()
        };
        Self {
            workers: Workers::new(LEASE),
            processes: (0..WORKERS).map(Process::new).collect(),
            jobs: [("a", 0), ("b", 5)].into_iter().map(job).collect(),
            stopped: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            recovery,
            store_fails: false,
        }
    }

    async fn run(&mut self, event: Event) {
        match event {
            Event::Round => self.round().await,
            Event::Act(worker) => self.act(worker),
            Event::Decide => self.decide(),
            Event::Kill(worker) => {
                self.cut(worker);
                let process = &mut self.processes[worker];
                (process.is_alive, process.held, process.assignment) = (false, None, None);
            }
            Event::Start(worker) => self.start(worker),
            Event::Cut(worker) => self.cut(worker),
            Event::Connect(worker) => self.connect(worker),
            Event::Drain(worker) => self.processes[worker].is_draining = true,
            Event::Forget(worker) => {
                let process = &mut self.processes[worker];
                let of = process.held.take().map(|held| (held.job_id, held.generation));
                process.assignment = None;
                if let Some((job, generation)) = of {
                    self.break_ranks(&job, generation);
                }
                self.report(worker);
            }
            Event::Fail(worker) => {
                let process = &mut self.processes[worker];
                if let Some(held) = process.held.as_mut().filter(|held| held.phase() != Phase::Finished) {
                    let (job, generation) = (held.job_id.clone(), held.generation);
                    (held.fault, held.cause) = (LOCAL_FAULTS[worker].into(), "a fault".to_owned());
                    process.enter(Phase::Failed);
                    self.break_ranks(&job, generation);
                }
                self.report(worker);
            }
            Event::Pause(job) => self.request(["a", "b"][job], Request::Pause),
            Event::Resume(job) => self.request(["a", "b"][job], Request::Resume),
            Event::RestartCoordinator => self.restart_coordinator(),
            Event::FailStore => self.store_fails = true,
            Event::Wait => self.advance(2 * LEASE).await,
        }
    }

    async fn round(&mut self) {
        for worker in 0..WORKERS {
            self.act(worker);
        }
        self.advance_groups();
        self.advance(ROUND).await;
        self.decide();
    }

    /// Time passes; connected workers send heartbeats.
    async fn advance(&mut self, time: Duration) {
        tokio::time::advance(time).await;
        for worker in 0..WORKERS {
            self.processes[worker].give_up_forming(self.recovery.forming_seconds / 2.0);
            self.report(worker);
        }
        self.workers.expire(Instant::now());
    }

    fn cut(&mut self, worker: usize) {
        if let Some((session, _)) = self.processes[worker].connection.take() {
            self.workers.disconnected(session, "cut");
        }
        self.processes[worker].directive = v1::Directive::default();
    }

    fn start(&mut self, worker: usize) {
        let process = &mut self.processes[worker];
        if !process.is_alive {
            (process.is_alive, process.is_draining) = (true, false);
            process.instance += 1;
        }
        self.connect(worker);
    }

    fn connect(&mut self, worker: usize) {
        let process = &mut self.processes[worker];
        if !process.is_alive || process.connection.is_some() {
            return;
        }
        let (outbox, inbox): (Outbox, _) = mpsc::channel(64);
        let session = self.workers.admit(process.hello(), outbox).unwrap();
        process.connection = Some((session, inbox));
        process.directive = v1::Directive::default();
    }

    fn report(&mut self, worker: usize) {
        let process = &self.processes[worker];
        if let Some((session, _)) = &process.connection {
            self.workers.record_message(*session, Some(process.status()));
        }
    }

    /// A worker reads its messages, does what its directive says, and reports.
    fn act(&mut self, worker: usize) {
        if !self.processes[worker].is_alive {
            return;
        }
        let saved = self.processes[worker].act();
        if let Some(assignment) = saved {
            // The coordinator accepts files of the current generation only.
            let job = self.jobs.get(&assignment.job_id);
            if job.is_some_and(|job| job.row.generation == assignment.generation) {
                let newest = self.checkpoints.entry(assignment.job_id).or_default();
                *newest = self.processes[worker].completed_steps().max(*newest);
                self.processes[worker].enter(Phase::Saved);
            }
        }
        self.report(worker);
    }

    /// Groups form, train a step, stop and break, over connections of their own.
    fn advance_groups(&mut self) {
        let groups: BTreeMap<(String, u64), Vec<String>> = self
            .processes
            .iter()
            .filter_map(|process| process.assignment.as_ref())
            .map(|of| ((of.job_id.clone(), of.generation), of.peers.clone()))
            .collect();
        for ((job, generation), peers) in groups {
            let ranks: Vec<usize> =
                (0..WORKERS).filter(|&worker| self.processes[worker].is_in(&job, generation)).collect();
            let with =
                |phase: Phase| ranks.iter().filter(|&&w| self.processes[w].phase() == Some(phase)).count();
            let (forming, training) = (with(Phase::Forming), with(Phase::Training));
            let newest = ranks.iter().map(|&w| self.processes[w].completed_steps()).max().unwrap_or(0);
            let stop = ranks.iter().any(|&w| matches!(self.processes[w].goal(), Goal::Stop | Goal::Save));
            let next = if forming == peers.len() {
                Some((Phase::Training, newest))
            } else if training == peers.len() {
                let steps = TOTAL_STEPS.min(newest + 1);
                Some(match (steps >= TOTAL_STEPS, stop) {
                    (true, _) => (Phase::Finished, steps),
                    (false, true) => (Phase::Stopped, steps),
                    (false, false) => (Phase::Training, steps),
                })
            } else {
                if ranks.len() < peers.len() {
                    // A peer died or left for another generation.
                    self.break_ranks(&job, generation);
                }
                None
            };
            let Some((phase, steps)) = next else { continue };
            for worker in ranks {
                let process = &mut self.processes[worker];
                let is_first = process.assignment.as_ref().is_some_and(|of| of.rank == 0);
                if let Some(held) = &mut process.held {
                    held.completed_steps = steps;
                    if phase == Phase::Finished && is_first {
                        held.files = vec!["adapter".to_owned()];
                    }
                    process.enter(phase);
                }
            }
        }
    }

    /// The connections between the ranks of a group break. Some ranks have finished the step.
    fn break_ranks(&mut self, job: &str, generation: u64) {
        let ranks = self.processes.iter_mut().filter(|process| process.is_in(job, generation));
        for (rank, process) in ranks.enumerate() {
            if process.phase() == Some(Phase::Training) && rank % 2 == 1 {
                process.held.iter_mut().for_each(|held| held.completed_steps += 1);
            }
            if matches!(process.phase(), Some(Phase::Training | Phase::Forming)) {
                process.enter(Phase::Broken);
            }
        }
    }

    fn state(&self, id: &str) -> JobState {
        self.jobs.get(id).map(Job::state).or(self.stopped.get(id).map(|row| row.state)).unwrap()
    }

    fn request(&mut self, id: &str, request: Request) {
        let state = self.state(id);
        match request.answer(state) {
            Answer::Apply(action) => {
                if let Some(row) = self.stopped.remove(id) {
                    self.jobs.insert(id.to_owned(), Job::new(row, None, &Recorded::default()).unwrap());
                }
                self.apply(id, action);
            }
            Answer::Resume => {
                let row = self.stopped.remove(id).unwrap();
                let job = Job::new(row, None, &Recorded::default()).unwrap();
                let (spec, message) = (Box::new(job.spec.clone()), Box::new(job.row.spec.clone()));
                let resume = Action::Resume { spec, message, is_valid: true };
                let resumed = job.changed(resume, GroupMaterial::default()).unwrap();
                self.jobs.insert(id.to_owned(), resumed.job);
            }
            Answer::Nothing | Answer::Refuse => {}
        }
    }

    fn restart_coordinator(&mut self) {
        for worker in 0..WORKERS {
            self.cut(worker);
        }
        self.workers = Workers::new(LEASE);
        for job in self.jobs.values_mut() {
            *job =
                Job::new(job.row.clone(), checkpoint(&self.checkpoints, &job.row.id), &Recorded::default())
                    .unwrap();
            for member in &job.row.members {
                self.workers.expect_reconnect(&member.worker, &member.instance_id, &member.peer_address);
            }
        }
    }

    /// Two rounds of decisions, as in the service, then directives.
    fn decide(&mut self) {
        for _ in 0..2 {
            for id in self.jobs.keys().cloned().collect::<Vec<_>>() {
                let Some(job) = self.jobs.get(&id).filter(|job| job.state().is_active()) else { continue };
                let circumstances = Circumstances {
                    recovery: &self.recovery,
                    now: Instant::now(),
                    last_stored_step: TOTAL_STEPS,
                    checkpoint_step: self.checkpoints.get(&id).copied().unwrap_or(0),
                    gives_way: gives_way(job, self.jobs.values()),
                    has_substitute: has_substitute(job, &self.workers),
                };
                for action in reconcile(job, &observe(&job.row, &self.workers), circumstances) {
                    if self.fails_to_store(&action) {
                        break;
                    }
                    self.apply(&id, action);
                }
            }
            for (id, action) in schedule(self.jobs.values().collect(), &self.workers, u32::MAX) {
                if self.fails_to_store(&action) {
                    break;
                }
                self.apply(&id, action);
            }
        }
        for worker in 0..WORKERS {
            let name = self.processes[worker].name.clone();
            let job = self.jobs.values().find(|job| job.has_member(&name));
            let (assignment, goal) =
                job.map_or((None, Goal::Unspecified), |job| job.desired_state(&name, &self.workers));
            let assignment = assignment.cloned();
            self.workers.send_directive(&name, assignment.as_ref(), goal);
        }
    }

    fn fails_to_store(&mut self, action: &Action) -> bool {
        action.is_stored() && std::mem::take(&mut self.store_fails)
    }

    fn apply(&mut self, id: &str, action: Action) {
        let Some(job) = self.jobs.get(id) else { return };
        self.check_that_no_state_is_given_up(job, &action);
        if let (JobState::Waiting, Some(before), Action::Enter(next)) =
            (job.state(), job.phase.waiting(), &action)
        {
            let after = next.waiting().map(|regroup| &regroup.reason);
            assert_eq!(after, Some(&before.reason), "{id} forgets why it waits");
        }
        // The store may have failed between the end of a group and the next one.
        if let (GroupPhase::Regrouping(before), Action::Enter(GroupPhase::Regrouping(next))) =
            (&job.phase, &action)
            && !next.is_failure
        {
            assert_eq!(next.reason, before.reason, "{id} forgets why its group ended");
        }
        // The workers of a paused job were asked to release it when it was paused.
        if action == Action::Cancel && job.state() == JobState::Cancelling {
            let members = observe(&job.row, &self.workers);
            let is_member = |name: &str| members.iter().any(|m| m.row.worker == name && !m.is_lost());
            let holds = |process: &&Process| {
                let held = process.held.as_ref();
                is_member(&process.name) && process.is_alive && held.is_some_and(|held| held.job_id == id)
            };
            let holders: Vec<_> = self.processes.iter().filter(holds).map(|process| &process.name).collect();
            assert!(holders.is_empty(), "{id} is cancelled, and {holders:?} hold it");
        }
        if let Action::Succeed { files, .. } = &action {
            assert!(!files.is_empty(), "{id} succeeds without a result");
        }
        let token = "secret".to_owned();
        let group = GroupMaterial { checkpoint: checkpoint(&self.checkpoints, id), token };
        let change = job.changed(action.clone(), group).expect("the table allows the transition");
        if let Action::Form(new) = &action {
            let assigned = change.events.iter().find_map(|event| match event {
                job_event::Kind::Assigned(assigned) => Some(assigned.checkpoint_step),
                _ => None,
            });
            let start = new.newest_in_memory.max(assigned.expect("the group is recorded"));
            assert!(start >= self.checkpoints.get(id).copied(), "{new:?} starts behind the store");
            assert!(new.members.len() >= change.job.spec.workers.min);
        }
        assert!(change.job.row.members.len() <= change.job.spec.workers.max, "{:?}", change.job.row.members);
        if change.job.state() == JobState::Failed {
            let remains = |process: &&Process| {
                process.connection.is_some()
                    && !process.is_draining
                    && process.phase() != Some(Phase::Failed)
                    && !job.excludes(&process.name, &process.hello().instance_id)
            };
            let others: Vec<_> = self.processes.iter().filter(remains).map(|process| &process.name).collect();
            assert!(
                others.is_empty(),
                "{id} fails, and {others:?} could run it: {:?}",
                change.job.row.failure
            );
        }
        if change.job.state().is_stopped() {
            self.jobs.remove(id);
            self.stopped.insert(id.to_owned(), change.job.row);
        } else {
            self.jobs.insert(id.to_owned(), change.job);
        }
    }

    /// A state that a connected, healthy member holds is lost only if the store or a remaining
    /// member has the same steps.
    fn check_that_no_state_is_given_up(&self, job: &Job, action: &Action) {
        let members = observe(&job.row, &self.workers);
        let stored = self.checkpoints.get(&job.row.id).copied().unwrap_or(0);
        let stays: Vec<&str> = match action {
            Action::Pause => Vec::new(),
            Action::KeepMembers(rows) => rows.iter().map(|row| row.worker.as_str()).collect(),
            Action::Enter(GroupPhase::Regrouping(regroup)) if !regroup.is_failure => {
                let rows =
                    if job.state() == JobState::Waiting { &job.row.members } else { &regroup.remaining };
                rows.iter().map(|row| row.worker.as_str()).collect()
            }
            Action::Form(new) => new.members.iter().map(|row| row.worker.as_str()).collect(),
            _ => return,
        };
        let is_broken_away = |worker: &str| {
            matches!(&job.phase, GroupPhase::Regrouping(regroup)
                if regroup.is_failure && !regroup.remaining.iter().any(|row| row.worker == worker))
        };
        let steps = |kept: bool| {
            let of = members.iter().filter(|member| stays.contains(&member.row.worker.as_str()) == kept);
            let of = of.filter(|member| kept || !is_broken_away(&member.row.worker));
            of.filter_map(|member| match (member.state, job.state()) {
                // A job that waits has time until a disconnected member is lost.
                (MemberState::Disconnected, JobState::Waiting) => {
                    self.steps_of(&member.row.worker, &job.row.id)
                }
                _ => member.steps(),
            })
            .max()
            .unwrap_or(0)
        };
        let (lost, safe) = (steps(false), steps(true).max(stored));
        assert!(lost <= safe, "{action:?} gives up step {lost}, and step {safe} is safe");
    }

    /// The completed steps of the job's state in a worker's memory.
    fn steps_of(&self, worker: &str, job: &str) -> Option<u64> {
        let process = self.processes.iter().find(|process| process.name == worker)?;
        let held = process.held.as_ref().filter(|held| held.job_id == job && has_state(held.phase()));
        held.map(|held| held.completed_steps)
    }

    /// Ends all faults, and waits until the job `cancelled` is cancelled and the others have
    /// succeeded. Only `survivors` of the workers remain.
    async fn heal(&mut self, survivors: usize, cancelled: Option<&str>) {
        self.store_fails = false;
        for worker in survivors..WORKERS {
            self.run(Event::Kill(worker)).await;
        }
        // A worker that failed is repaired.
        for worker in 0..survivors {
            let process = &self.processes[worker];
            let instance = process.hello().instance_id;
            let is_excluded = self.jobs.values().any(|job| job.excludes(&process.name, &instance));
            if is_excluded || process.phase() == Some(Phase::Failed) {
                self.run(Event::Kill(worker)).await;
            }
        }
        for _ in 0..ROUNDS_TO_SUCCEED {
            for worker in 0..survivors {
                // A drained worker ends when it is released, and is started again.
                if self.processes[worker].is_draining && self.processes[worker].held.is_none() {
                    self.run(Event::Kill(worker)).await;
                }
                self.start(worker);
            }
            for job in [0, 1] {
                Box::pin(self.run(Event::Resume(job))).await;
            }
            self.round().await;
            let has_ended = |row: &JobRow| match cancelled == Some(&row.id) {
                true => row.state == JobState::Cancelled,
                false => row.state == JobState::Succeeded,
            };
            if self.jobs.is_empty() && self.stopped.values().all(has_ended) {
                return;
            }
        }
        let states: Vec<_> = self.jobs.values().map(|job| (&job.row.id, job.state(), &job.phase)).collect();
        let held: Vec<_> = self.processes.iter().map(|p| (&p.name, p.goal(), &p.held)).collect();
        panic!("not ended: {states:#?} {:?} {held:#?}", self.stopped.keys());
    }
}

fn checkpoint(checkpoints: &BTreeMap<String, u64>, job: &str) -> Option<v1::Checkpoint> {
    checkpoints.get(job).map(|step| v1::Checkpoint { step: *step, ..v1::Checkpoint::default() })
}

/// Runs the events, then cancels the job `cancel` if there is one, then ends the faults.
fn simulate(events: &[Event], survivors: usize, cancel: Option<&str>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(async {
        let mut world = World::new();
        for event in events {
            world.run(*event).await;
        }
        let cancelled = cancel.filter(|id| world.state(id) != JobState::Succeeded);
        if let Some(id) = cancelled {
            world.request(id, Request::Cancel);
        }
        world.heal(survivors, cancelled).await;
    });
}

#[test]
fn without_faults_both_jobs_succeed() {
    simulate(&[], WORKERS, None);
}

/// The state of members that wait for a peer is not given up: they report it once they give up
/// forming their group, before the coordinator's time limit.
#[test]
fn a_pause_while_a_group_forms_keeps_the_state_of_the_members_that_wait() {
    let events = [
        Event::Connect(1),
        Event::Start(2),
        Event::Pause(1),
        Event::Round,
        Event::Kill(2),
        Event::Kill(1),
        Event::Connect(0),
        Event::Connect(4),
        Event::Start(1),
        Event::Drain(0),
        Event::Decide,
        Event::Round,
        Event::Round,
        Event::Round,
        Event::Start(2),
        Event::Round,
        Event::Round,
        Event::Round,
        Event::Pause(0),
        Event::Decide,
        Event::Forget(4),
    ];
    simulate(&events, WORKERS, None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn no_fault_loses_a_step_or_stops_a_job(events in events(), survivors in 2..=WORKERS) {
        simulate(&events, survivors, None);
    }

    #[test]
    fn no_fault_keeps_a_job_from_being_cancelled(
        events in events(), survivors in 2..=WORKERS, job in prop::sample::select(vec!["a", "b"]),
    ) {
        simulate(&events, survivors, Some(job));
    }
}
