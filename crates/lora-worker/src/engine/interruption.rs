//! The ways in which a piece of work ends before it is complete.

use lora_collective::CollectiveError;
use lora_train::TrainError;

/// The reason why a piece of work ended early.
#[derive(Debug)]
pub(super) enum Interruption {
    /// The work is no longer desired.
    Superseded,
    /// The group failed, not the job.
    GroupFailure(GroupFailure),
    /// The job cannot continue on this worker; contains the cause.
    Failed(String),
}

/// The cause of a group's failure.
#[derive(Debug)]
pub(super) struct GroupFailure {
    pub(super) cause: String,
    /// Ranks that the error points to.
    pub(super) suspects: Vec<u32>,
    /// Ranks to which no connection could be made.
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
            // No peer caused these errors, and they would occur in another group too.
            CollectiveError::Argument(_) | CollectiveError::NoNccl(_) | CollectiveError::BuiltWithoutCuda => {
                Self::Failed(error.to_string())
            }
            error => Self::GroupFailure(GroupFailure {
                cause: error.to_string(),
                suspects: ranks(error.suspects()),
                unreachable: ranks(error.unreachable()),
            }),
        }
    }
}
