//! The state that the coordinator wants this worker to have.

use std::sync::Arc;
use std::time::Duration;

use lora_proto::v1;

/// The time limits of a group, which follow from the coordinator's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GroupLimits {
    /// How long forming a group may take. It is less than the coordinator's limit, so that the
    /// coordinator receives the reason.
    pub(crate) form: Duration,
    /// How long ranks wait for a rank that makes no progress. Ranks wait for a rank that computes,
    /// so it is longer than the coordinator's limit, which ends a group without progress. A lost
    /// connection is noticed at once.
    pub(crate) peer: Duration,
}

impl GroupLimits {
    /// The limits for a coordinator with this welcome. `None` if it has no valid limits.
    pub(crate) fn new(welcome: &v1::Welcome) -> Option<Self> {
        let limit = |seconds| Duration::try_from_secs_f64(seconds).ok().filter(|limit| !limit.is_zero());
        Some(Self { form: limit(welcome.forming_seconds / 2.0)?, peer: limit(welcome.step_seconds * 2.0)? })
    }
}

/// The desired state: the contents of the newest directive.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DesiredState {
    pub(crate) assignment: Option<Arc<v1::Assignment>>,
    pub(crate) goal: v1::Goal,
    /// The number of the directive in its connection. 0 if there has been none in this connection.
    pub(crate) number: u64,
}

impl DesiredState {
    /// The desired state without a job.
    pub(crate) fn none() -> Self {
        Self { assignment: None, goal: v1::Goal::Unspecified, number: 0 }
    }

    /// Changes the goal to stop at the next step boundary, for when no coordinator can ask for it.
    /// Returns true if that changes the goal.
    pub(crate) fn stop_training(&mut self) -> bool {
        let training = self.assignment.is_some() && self.goal == v1::Goal::Train;
        if training {
            self.goal = v1::Goal::Stop;
        }
        training
    }
}

impl From<v1::Directive> for DesiredState {
    fn from(directive: v1::Directive) -> Self {
        let goal = directive.goal();
        Self { assignment: directive.assignment.map(Arc::new), goal, number: directive.number }
    }
}

/// What a piece of work belongs to. The work is cancelled once its scope is no longer desired.
#[derive(Debug, Clone)]
pub(crate) enum WorkScope {
    /// A job, in any generation.
    Job(String),
    /// A job's group in one generation.
    Group(String, u64),
}

impl WorkScope {
    /// The job of `assignment`.
    pub(crate) fn job(assignment: &v1::Assignment) -> Self {
        Self::Job(assignment.job_id.clone())
    }

    /// The group of `assignment`.
    pub(crate) fn group(assignment: &v1::Assignment) -> Self {
        Self::Group(assignment.job_id.clone(), assignment.generation)
    }

    /// Whether `desired` still has this scope.
    pub(crate) fn is_current(&self, desired: &DesiredState) -> bool {
        desired.assignment.as_deref().is_some_and(|assignment| match self {
            Self::Job(job_id) => *job_id == assignment.job_id,
            Self::Group(job_id, generation) => {
                (job_id, *generation) == (&assignment.job_id, assignment.generation)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_of_a_group_follow_from_the_coordinators_settings() {
        let welcome = |forming_seconds, step_seconds| v1::Welcome {
            forming_seconds,
            step_seconds,
            ..v1::Welcome::default()
        };
        let limits = GroupLimits::new(&welcome(7200.0, 86400.0)).unwrap();
        assert_eq!(
            limits,
            GroupLimits { form: Duration::from_secs(3600), peer: Duration::from_secs(172_800) }
        );
        for (forming, step) in [(0.0, 1.0), (1.0, 0.0), (f64::NAN, 1.0), (1.0, -1.0), (1.0, f64::MAX)] {
            assert_eq!(GroupLimits::new(&welcome(forming, step)), None, "{forming} {step}");
        }
    }
}
