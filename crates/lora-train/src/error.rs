use std::path::PathBuf;

use lora_collective::CollectiveError;
use lora_collective::tree::TreeError;
use lora_data::DataError;
use lora_model::ModelError;
use lora_spec::FieldError;

/// What can end a training run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The base or an adapter.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The dataset or the tokenizer.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A setting of the job.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The other ranks.
    #[error(transparent)]
    Group(CollectiveError),
    /// Given up with a [`lora_collective::CancelToken`].
    #[error("cancelled")]
    Cancelled,
    /// Micro-batches that cannot be dealt to the ranks.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// An operation on tensors failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A checkpoint that cannot be resumed from.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// Ranks that should be equal are not.
    #[error(
        "step {step}: the state of rank {rank} differs from the others'; its machine computes other bits or its memory is damaged"
    )]
    Diverged {
        /// Step after which the states differ.
        step: u64,
        /// The rank that is unlike the others.
        rank: usize,
    },
    /// A message of another rank that makes no sense.
    #[error("rank {rank} sent a step message that cannot be read")]
    Message {
        /// The sender.
        rank: usize,
    },
    /// Too many steps in a row gave gradients that are not finite.
    #[error(
        "step {step}: {what} is not finite, for the {count}th step in a row; lower training.learning_rate or look at the data"
    )]
    NotFinite {
        /// The last of the steps.
        step: u64,
        /// The first tensor that is not finite.
        what: String,
        /// Steps in a row.
        count: u64,
    },
    /// The exported adapter does not compute what was trained.
    #[error("the exported adapter was loaded again and gave other logits than the trained one")]
    Export,
    /// A file cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A result that is not what its receipt says.
    #[error("{0}")]
    Receipt(String),
}

impl From<CollectiveError> for TrainError {
    fn from(error: CollectiveError) -> Self {
        match error {
            CollectiveError::Cancelled => Self::Cancelled,
            error => Self::Group(error),
        }
    }
}
