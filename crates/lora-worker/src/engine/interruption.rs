//! The ways in which a piece of work ends before it is complete.

use lora_collective::CollectiveError;
use lora_data::DataError;
use lora_model::ModelError;
use lora_proto::v1::Fault;
use lora_train::TrainError;

use crate::fetch::FetchError;

/// The reason why a piece of work ended early.
#[derive(Debug)]
pub(super) enum Interruption {
    /// The work is no longer desired.
    Superseded,
    /// The group failed, not the job.
    GroupFailure(GroupFailure),
    /// The job cannot continue on this worker: what is at fault, and the cause.
    Failed(Fault, String),
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
            error => Self::Failed(fault(&error), error.to_string()),
        }
    }
}

impl From<FetchError> for Interruption {
    fn from(error: FetchError) -> Self {
        let fault = match &error {
            // A base that this worker may not read. Other refusals are about the request.
            FetchError::Refused { field, .. } if ["model.base", "model_roots"].contains(field) => Fault::Base,
            FetchError::Refused { .. } => Fault::Job,
            FetchError::Local { .. } | FetchError::Busy { .. } => Fault::Disk,
            FetchError::Transfer { .. } | FetchError::Remote { .. } => Fault::Fetch,
        };
        Self::Failed(fault, error.to_string())
    }
}

/// What is at fault for an error of training. Errors that every worker would report are the job's.
fn fault(error: &TrainError) -> Fault {
    match error {
        TrainError::TooLarge(_) => Fault::Memory,
        TrainError::Io { .. } | TrainError::Data(DataError::Read { .. }) => Fault::Disk,
        TrainError::Tensor(_) | TrainError::Model(ModelError::Tensor(_)) => Fault::Engine,
        TrainError::Model(ModelError::Config(_) | ModelError::Safetensors(_) | ModelError::Io { .. }) => {
            Fault::Base
        }
        _ => Fault::Job,
    }
}

impl From<CollectiveError> for Interruption {
    fn from(error: CollectiveError) -> Self {
        let ranks = |ranks: Vec<usize>| ranks.into_iter().map(|rank| rank as u32).collect();
        match error {
            CollectiveError::Cancelled => Self::Superseded,
            // No peer caused these errors, and they would occur in another group too.
            CollectiveError::Argument(_) | CollectiveError::NoNccl(_) | CollectiveError::BuiltWithoutCuda => {
                Self::Failed(Fault::Engine, error.to_string())
            }
            error => Self::GroupFailure(GroupFailure {
                cause: error.to_string(),
                suspects: ranks(error.suspects()),
                unreachable: ranks(error.unreachable()),
            }),
        }
    }
}
