//! What happens to the simulated jobs, workers and coordinator.

use proptest::prelude::*;

use super::WORKERS;

#[derive(Debug, Clone, Copy)]
pub(super) enum Event {
    /// Every worker acts once, and the coordinator decides once.
    Round,
    /// One worker acts.
    Act(usize),
    /// The coordinator decides.
    Decide,
    /// A worker's process dies with its state.
    Kill(usize),
    /// A dead worker is started again.
    Start(usize),
    /// A worker's connection breaks; its process continues.
    Cut(usize),
    Connect(usize),
    Drain(usize),
    /// A worker's process loses its job, as after an error, and stays connected.
    Forget(usize),
    /// A worker fails by itself. No two workers have the same fault.
    Fail(usize),
    Pause(usize),
    Resume(usize),
    RestartCoordinator,
    /// The store fails at the next action.
    FailStore,
    /// More than a lease passes.
    Wait,
}

pub(super) fn events() -> impl Strategy<Value = Vec<Event>> {
    let worker = 0..WORKERS;
    let event = prop_oneof![
        10 => Just(Event::Round),
        4 => worker.clone().prop_map(Event::Act),
        4 => Just(Event::Decide),
        2 => worker.clone().prop_map(Event::Kill),
        3 => worker.clone().prop_map(Event::Start),
        2 => worker.clone().prop_map(Event::Cut),
        3 => worker.clone().prop_map(Event::Connect),
        1 => worker.clone().prop_map(Event::Drain),
        1 => worker.clone().prop_map(Event::Forget),
        2 => worker.prop_map(Event::Fail),
        2 => (0..2_usize).prop_map(Event::Pause),
        3 => (0..2_usize).prop_map(Event::Resume),
        1 => Just(Event::RestartCoordinator),
        1 => Just(Event::FailStore),
        1 => Just(Event::Wait),
    ];
    prop::collection::vec(event, 0..80)
}
