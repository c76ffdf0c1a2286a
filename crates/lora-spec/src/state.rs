//! The states of a job and the table of their transitions.

use serde::{Deserialize, Serialize};

/// The state of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// The coordinator checks the job's settings, base and data.
    Validating,
    /// The job waits for workers.
    Queued,
    /// The job's workers load the base and the data.
    Preparing,
    /// The job trains.
    Running,
    /// The job's workers form a new group, because a worker was lost, left or joined.
    Recovering,
    /// The job has started, and fewer workers than `workers.min` are left. They hold its state.
    Waiting,
    /// The job was asked to stop after the current step, with a checkpoint.
    Pausing,
    /// The job has stopped with a checkpoint and can continue from it.
    Paused,
    /// The job was cancelled, and its workers free its memory.
    Cancelling,
    /// The adapter is exported and verified.
    Succeeded,
    /// The job ended with an error. Like a paused job it can be resumed from its newest checkpoint.
    Failed,
    /// The job was cancelled by its owner.
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

    /// Returns the states that may follow this one.
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
            // A job that is paused during its last step succeeds.
            Self::Pausing => &[Paused, Cancelling, Succeeded, Failed],
            Self::Paused | Self::Failed => &[Validating, Queued, Cancelled],
            Self::Cancelling => &[Cancelled],
            Self::Succeeded | Self::Cancelled => &[],
        }
    }

    /// Returns whether `next` may follow this state.
    pub fn can_become(self, next: Self) -> bool {
        self.successors().contains(&next)
    }

    /// Returns whether a job stays in this state until a client acts.
    pub fn is_stopped(self) -> bool {
        matches!(self, Self::Paused | Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Returns whether workers may hold a job in this state.
    pub fn is_active(self) -> bool {
        !self.is_stopped() && !matches!(self, Self::Validating | Self::Queued)
    }

    /// Returns whether no state follows this one.
    pub fn is_terminal(self) -> bool {
        self.successors().is_empty()
    }

    /// Returns the state's name, as in the protocol.
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

    /// Returns the state with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_is_reachable_and_leads_to_a_terminal_state() {
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
