use std::path::PathBuf;

use lora_collective::CollectiveError;
use lora_collective::tree::TreeError;
use lora_data::DataError;
use lora_model::ModelError;
use lora_plan::TooLarge;
use lora_spec::FieldError;

use crate::logit_difference::LogitDifference;

/// An error that ends a training run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// An error of the base or an adapter.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An error of the dataset or the tokenizer.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A setting of the job is invalid.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The job needs more memory than the worker has.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// An error of the connections to the other ranks.
    #[error(transparent)]
    Group(CollectiveError),
    /// The run was cancelled with a [`lora_collective::CancelToken`].
    #[error("cancelled")]
    Cancelled,
    /// The micro-batches cannot be divided among the ranks.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// An operation on tensors failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A checkpoint cannot be written, or cannot be resumed from.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// The states of ranks differ.
    #[error(
        "step {step}: the state of rank {rank} differs from the others'; its machine computes other bits or \
         its memory is faulty"
    )]
    Diverged {
        /// Step after which the states differ.
        step: u64,
        /// The rank with the different state.
        rank: usize,
    },
    /// A rank has other token rows than rank 0.
    #[error(
        "rank {rank} has other inputs than rank 0: its data, its tokenizer or its chat template differ; all \
         workers need the same files"
    )]
    OtherInputs {
        /// The first rank with other inputs.
        rank: usize,
    },
    /// A step message of a rank cannot be encoded or decoded.
    #[error("rank {rank} sent a step message that cannot be read")]
    Message {
        /// The sender.
        rank: usize,
    },
    /// Too many steps in a row had losses or gradients that are not finite.
    #[error(
        "step {step}: {what} is not finite, for {} in a row; lower training.learning_rate or \
         check the data",
        steps(*count)
    )]
    NotFinite {
        /// The last of the steps.
        step: u64,
        /// The first loss or gradient that is not finite.
        what: String,
        /// Number of steps in a row.
        count: u64,
    },
    /// The trained adapter gives logits that are not finite.
    #[error(
        "the trained adapter gives logits that are not finite, so nothing is exported; lower \
         training.learning_rate or check the base"
    )]
    ExportNotFinite,
    /// The exported adapter computes other logits than the trained one.
    #[error(
        "the adapter that was read back from its files gives other logits than the trained one: they \
         differ by up to {}, {:.1e} of the largest logit (at most {bound:.1e} is accepted), and the KL \
         divergence is {:.1e} nats a token",
        difference.largest_difference, difference.relative(), difference.kl_divergence
    )]
    Export {
        /// The measured difference.
        difference: LogitDifference,
        /// The largest accepted difference, in units of the largest logit.
        bound: f64,
    },
    /// A file cannot be read.
    #[error("{name}: {source}", name = name.display())]
    Io {
        /// Name of the file.
        name: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A result does not match its receipt.
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

/// `1 step`, `2 steps`.
fn steps(count: u64) -> String {
    format!("{count} step{}", if count == 1 { "" } else { "s" })
}
