//! How a piece of work ends before its end.

use lora_collective::CollectiveError;
use lora_train::TrainError;

/// Why a piece of work ended early.
#[derive(Debug)]
pub(super) enum Interruption {
    /// It is not wanted any more.
    Superseded,
    /// The group broke; the job is not to blame.
    GroupFailure(GroupFailure),
    /// The job cannot go on here: the cause.
    Failed(String),
}

/// What a group broke of.
#[derive(Debug)]
pub(super) struct GroupFailure {
    pub(super) cause: String,
    /// Ranks that the error points at.
    pub(super) suspects: Vec<u32>,
    /// Ranks with which no connection came about.
    pub(super) unreachable: Vec<u32>,
}

impl From<TrainError> for Interruption {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Cancelled => Self::Superseded,
            TrainError::Group(error) => error.into(),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl From<CollectiveError> for Interruption {
    fn from(error: CollectiveError) -> Self {
        let ranks = |ranks: Vec<usize>| ranks.into_iter().map(|rank| rank as u32).collect();
        match error {
            CollectiveError::Cancelled => Self::Superseded,
            // No peer did that, and another group would be no better.
            CollectiveError::Argument(_) | CollectiveError::NoNccl(_) => Self::Failed(error.to_string()),
            error => Self::GroupFailure(GroupFailure {
                cause: error.to_string(),
                suspects: ranks(error.suspects()),
                unreachable: ranks(error.unreachable()),
            }),
        }
    }
}
