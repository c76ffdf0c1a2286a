//! The states of a job and the one table of their transitions.

use serde::{Deserialize, Serialize};

/// Where a job is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Its settings, base and data are being checked.
    Validating,
    /// It waits for workers.
    Queued,
    /// Its workers load the base and the data.
    Preparing,
    /// It trains.
    Running,
    /// It was asked to stop after the step that is being computed, with a checkpoint.
    Pausing,
    /// It has stopped with a checkpoint and can go on from it.
    Paused,
    /// The adapter is exported and verified.
    Succeeded,
    /// It ended with an error.
    Failed,
}

impl JobState {
    /// Every state.
    pub const ALL: [Self; 8] = [
        Self::Validating,
        Self::Queued,
        Self::Preparing,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Succeeded,
        Self::Failed,
    ];

    /// The states that may follow this one.
    pub fn successors(self) -> &'static [Self] {
        use JobState::{Failed, Paused, Pausing, Preparing, Queued, Running, Succeeded};
        match self {
            Self::Validating => &[Queued, Failed],
            Self::Queued => &[Preparing, Paused, Failed],
            Self::Preparing => &[Running, Pausing, Failed],
            Self::Running => &[Pausing, Succeeded, Failed],
            // A pause that meets the last step finds the job finished.
            Self::Pausing => &[Paused, Succeeded, Failed],
            Self::Paused => &[Queued],
            Self::Succeeded | Self::Failed => &[],
        }
    }

    /// Whether `next` may follow this state.
    pub fn may_become(self, next: Self) -> bool {
        self.successors().contains(&next)
    }

    /// Whether nothing follows.
    pub fn is_final(self) -> bool {
        self.successors().is_empty()
    }

    /// The state's name, as in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_can_be_reached_and_can_end() {
        for state in JobState::ALL {
            let mut seen = vec![state];
            let mut at = 0;
            while at < seen.len() {
                for next in seen[at].successors() {
                    if !seen.contains(next) {
                        seen.push(*next);
                    }
                }
                at += 1;
            }
            assert!(seen.iter().any(|s| s.is_final()), "{state:?} never ends");
            let reached = JobState::ALL.iter().any(|s| s.may_become(state));
            assert!(reached || state == JobState::Validating, "{state:?} is never reached");
        }
    }

    #[test]
    fn a_failed_job_stays_failed() {
        assert!(JobState::ALL.iter().all(|s| !JobState::Failed.may_become(*s)));
        assert!(
            JobState::Failed.is_final() && JobState::Succeeded.is_final() && !JobState::Paused.is_final()
        );
    }

    #[test]
    fn names_are_those_of_serde() {
        for state in JobState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }
}
