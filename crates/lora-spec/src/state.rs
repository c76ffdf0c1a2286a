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
    /// Its workers form a group anew: one was lost, left or came.
    Recovering,
    /// It has begun, and fewer workers than it needs are left; they hold its state.
    Waiting,
    /// It was asked to stop after the step that is being computed, with a checkpoint.
    Pausing,
    /// It has stopped with a checkpoint and can go on from it.
    Paused,
    /// It was cancelled; its workers free its memory.
    Cancelling,
    /// The adapter is exported and verified.
    Succeeded,
    /// It ended with an error. Like a paused job it can be resumed, from its newest checkpoint.
    Failed,
    /// It was ended by its owner.
    Cancelled,
}

impl JobState {
    /// Every state.
    pub const ALL: [Self; 12] = [
        Self::Validating,
        Self::Queued,
        Self::Preparing,
        Self::Running,
        Self::Recovering,
        Self::Waiting,
        Self::Pausing,
        Self::Paused,
        Self::Cancelling,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The states that may follow this one.
    pub fn successors(self) -> &'static [Self] {
        use JobState::{
            Cancelled, Cancelling, Failed, Paused, Pausing, Preparing, Queued, Recovering, Running,
            Succeeded, Validating, Waiting,
        };
        match self {
            Self::Validating => &[Queued, Paused, Cancelled, Failed],
            Self::Queued => &[Preparing, Paused, Cancelled, Failed],
            Self::Preparing | Self::Recovering => {
                &[Running, Recovering, Waiting, Pausing, Cancelling, Failed]
            }
            Self::Running => &[Recovering, Waiting, Pausing, Cancelling, Succeeded, Failed],
            Self::Waiting => &[Recovering, Pausing, Cancelling, Failed],
            // A pause that meets the last step finds the job finished.
            Self::Pausing => &[Paused, Cancelling, Succeeded, Failed],
            Self::Paused | Self::Failed => &[Validating, Queued, Cancelled],
            Self::Cancelling => &[Cancelled],
            Self::Succeeded | Self::Cancelled => &[],
        }
    }

    /// Whether `next` may follow this state.
    pub fn can_become(self, next: Self) -> bool {
        self.successors().contains(&next)
    }

    /// Whether nothing happens to a job in this state unless somebody asks for it.
    pub fn is_at_rest(self) -> bool {
        matches!(self, Self::Paused | Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Whether workers may hold the job.
    pub fn is_active(self) -> bool {
        !self.is_at_rest() && !matches!(self, Self::Validating | Self::Queued)
    }

    /// Whether nothing can follow.
    pub fn is_terminal(self) -> bool {
        self.successors().is_empty()
    }

    /// The state's name, as in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Recovering => "recovering",
            Self::Waiting => "waiting",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Cancelling => "cancelling",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The state of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
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
            assert!(seen.iter().any(|s| s.is_terminal()), "{state:?} never ends");
            let reached = JobState::ALL.iter().any(|s| s.can_become(state));
            assert!(reached || state == JobState::Validating, "{state:?} is never reached");
        }
    }

    #[test]
    fn every_active_state_can_be_paused_cancelled_and_failed() {
        for state in JobState::ALL.into_iter().filter(|s| s.is_active()) {
            let leaving = matches!(state, JobState::Pausing | JobState::Cancelling);
            assert!(leaving || state.can_become(JobState::Pausing), "{state:?}");
            assert!(state == JobState::Cancelling || state.can_become(JobState::Cancelling), "{state:?}");
            assert!(state == JobState::Cancelling || state.can_become(JobState::Failed), "{state:?}");
        }
    }

    #[test]
    fn only_cancelling_leads_to_cancelled() {
        assert_eq!(JobState::Cancelling.successors(), [JobState::Cancelled]);
        assert!(JobState::Cancelled.is_terminal() && JobState::Succeeded.is_terminal());
        for state in JobState::ALL.into_iter().filter(|s| s.is_active() && *s != JobState::Cancelling) {
            assert!(!state.can_become(JobState::Cancelled), "{state:?} may hold memory of workers");
        }
    }

    #[test]
    fn names_match_serde() {
        for state in JobState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
            assert_eq!(JobState::from_name(state.name()), Some(state));
        }
    }
}
