//! The engine's next task, as a function of the loaded job and the desired state.

use std::sync::Arc;

use lora_proto::v1::{Assignment, Goal, Phase};

use crate::directive::DesiredState;
use crate::status::CurrentJob;

/// A piece of work of the engine.
#[derive(Debug, PartialEq)]
pub(super) enum Task {
    /// Wait: the observed state is the desired state.
    Wait,
    /// Release the job.
    Release,
    /// Load the job's base and data.
    Prepare(Arc<Assignment>),
    /// Take on another rank or generation in the loaded job.
    Reassign(Arc<Assignment>),
    /// Form the group and train.
    Train(Arc<Assignment>),
    /// Upload the state in memory.
    Save(Arc<Assignment>),
}

pub(super) fn next_task(current: Option<&CurrentJob>, desired: &DesiredState) -> Task {
    let Some(assignment) = desired.assignment.clone() else {
        return if current.is_some() { Task::Release } else { Task::Wait };
    };
    let Some(current) = current else { return Task::Prepare(assignment) };
    let same_group = current.generation == assignment.generation;
    match (current.phase, desired.goal) {
        _ if current.job_id != assignment.job_id => Task::Release,
        // A failed job has no state to continue from.
        (Phase::Failed, _) if !same_group => Task::Release,
        _ if !same_group => Task::Reassign(assignment),
        (Phase::Prepared, Goal::Train) => Task::Train(assignment),
        // A rank that has finished saves if rank 0 was lost before its result was accepted.
        (Phase::Prepared | Phase::Stopped | Phase::Broken | Phase::Finished, Goal::Save) => {
            Task::Save(assignment)
        }
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
        let mut current = CurrentJob::new(&assignment("job", 3));
        current.enter(phase);
        next_task(
            Some(&current),
            &DesiredState { assignment: Some(assignment(job_id, generation)), goal, number: 1 },
        )
    }

    #[test]
    fn an_idle_engine_prepares_the_desired_job() {
        assert_eq!(next_task(None, &DesiredState::none()), Task::Wait);
        for goal in [Goal::Prepare, Goal::Train, Goal::Stop, Goal::Save] {
            let desired = DesiredState { assignment: Some(assignment("job", 3)), goal, number: 1 };
            assert_eq!(next_task(None, &desired), Task::Prepare(assignment("job", 3)));
        }
    }

    #[test]
    fn an_undesired_job_is_released_in_any_phase() {
        for phase in (1..=11).map(|number| Phase::try_from(number).unwrap()) {
            let mut current = CurrentJob::new(&assignment("job", 3));
            current.enter(phase);
            assert_eq!(next_task(Some(&current), &DesiredState::none()), Task::Release);
            assert_eq!(next(phase, "another job", 3, Goal::Train), Task::Release);
        }
    }

    #[test]
    fn a_newer_generation_keeps_the_state_unless_the_job_failed() {
        for phase in (1..=10).map(|number| Phase::try_from(number).unwrap()) {
            assert_eq!(
                next(phase, "job", 4, Goal::Prepare),
                Task::Reassign(assignment("job", 4)),
                "{phase:?}"
            );
        }
        assert_eq!(next(Phase::Failed, "job", 4, Goal::Prepare), Task::Release);
        assert_eq!(next(Phase::Failed, "job", 3, Goal::Train), Task::Wait);
    }

    #[test]
    fn a_reached_goal_is_not_repeated() {
        let (train, save) = (Task::Train(assignment("job", 3)), Task::Save(assignment("job", 3)));
        assert_eq!(next(Phase::Prepared, "job", 3, Goal::Train), train);
        for phase in [Phase::Prepared, Phase::Stopped, Phase::Broken, Phase::Finished] {
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
        ] {
            assert_eq!(next(phase, "job", 3, goal), Task::Wait, "{phase:?} {goal:?}");
        }
    }
}
