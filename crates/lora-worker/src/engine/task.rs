//! What the engine does next: a function of what it holds and what is wanted.

use std::sync::Arc;

use lora_proto::v1::{Assignment, Goal, Phase};

use crate::status::Held;
use crate::wanted::Wanted;

/// A piece of work.
#[derive(Debug, PartialEq)]
pub(super) enum Task {
    /// All is as it should be.
    Wait,
    /// Let go of the job.
    Free,
    /// Load the job's base and data.
    Prepare(Arc<Assignment>),
    /// Take another place in the job that is held.
    TakePlace(Arc<Assignment>),
    /// Form the group and train.
    Train(Arc<Assignment>),
    /// Upload the state that is held.
    Save(Arc<Assignment>),
}

pub(super) fn next_task(held: Option<&Held>, wanted: &Wanted) -> Task {
    let Some(assignment) = wanted.assignment.clone() else {
        return if held.is_some() { Task::Free } else { Task::Wait };
    };
    let Some(held) = held else { return Task::Prepare(assignment) };
    let same_group = held.generation == assignment.generation;
    match (held.phase, wanted.goal) {
        _ if held.job_id != assignment.job_id => Task::Free,
        // Of a job that failed there is nothing to go on with.
        (Phase::Failed, _) if !same_group => Task::Free,
        _ if !same_group => Task::TakePlace(assignment),
        (Phase::Prepared, Goal::Train) => Task::Train(assignment),
        (Phase::Prepared | Phase::Stopped | Phase::Broken, Goal::Save) => Task::Save(assignment),
        _ => Task::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignment(job_id: &str, generation: u64) -> Arc<Assignment> {
        Arc::new(Assignment { job_id: job_id.into(), generation, ..Assignment::default() })
    }

    fn next(phase: Phase, job_id: &str, generation: u64, goal: Goal) -> Task {
        let mut held = Held::new(&assignment("job", 3));
        held.enter(phase);
        next_task(Some(&held), &Wanted { assignment: Some(assignment(job_id, generation)), goal, number: 1 })
    }

    #[test]
    fn an_engine_without_a_job_prepares_the_one_that_is_wanted() {
        assert_eq!(next_task(None, &Wanted::nothing()), Task::Wait);
        for goal in [Goal::Prepare, Goal::Train, Goal::Stop, Goal::Save] {
            let wanted = Wanted { assignment: Some(assignment("job", 3)), goal, number: 1 };
            assert_eq!(next_task(None, &wanted), Task::Prepare(assignment("job", 3)));
        }
    }

    #[test]
    fn a_job_that_is_not_wanted_is_let_go_of_in_any_phase() {
        for phase in (1..=11).map(|number| Phase::try_from(number).unwrap()) {
            let mut held = Held::new(&assignment("job", 3));
            held.enter(phase);
            assert_eq!(next_task(Some(&held), &Wanted::nothing()), Task::Free);
            assert_eq!(next(phase, "another job", 3, Goal::Train), Task::Free);
        }
    }

    #[test]
    fn a_newer_generation_takes_the_state_along_unless_the_job_failed() {
        for phase in (1..=10).map(|number| Phase::try_from(number).unwrap()) {
            assert_eq!(
                next(phase, "job", 4, Goal::Prepare),
                Task::TakePlace(assignment("job", 4)),
                "{phase:?}"
            );
        }
        assert_eq!(next(Phase::Failed, "job", 4, Goal::Prepare), Task::Free);
        assert_eq!(next(Phase::Failed, "job", 3, Goal::Train), Task::Wait);
    }

    #[test]
    fn goals_are_reached_once() {
        let (train, save) = (Task::Train(assignment("job", 3)), Task::Save(assignment("job", 3)));
        assert_eq!(next(Phase::Prepared, "job", 3, Goal::Train), train);
        for phase in [Phase::Prepared, Phase::Stopped, Phase::Broken] {
            assert_eq!(next(phase, "job", 3, Goal::Save), save);
        }
        for phase in [Phase::Stopped, Phase::Broken, Phase::Saved, Phase::Finished] {
            assert_eq!(next(phase, "job", 3, Goal::Train), Task::Wait, "{phase:?} needs a newer generation");
        }
        for (phase, goal) in [
            (Phase::Prepared, Goal::Prepare),
            (Phase::Prepared, Goal::Stop),
            (Phase::Stopped, Goal::Stop),
            (Phase::Saved, Goal::Save),
            (Phase::Finished, Goal::Save),
        ] {
            assert_eq!(next(phase, "job", 3, goal), Task::Wait, "{phase:?} {goal:?}");
        }
    }
}
