//! The receipt of a result: what went in, what came out, and the numbers of every step.
//!
//! It holds nothing that depends on time or on the number of workers: the same job, with the same paths, gives the same
//! receipt.

use lora_spec::JobSpec;
use serde::{Deserialize, Serialize};

/// `receipt.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// Version of this format.
    pub format: u32,
    /// What the bits depend on beside the job: build and instruction set, or GPU.
    pub numerics_id: String,
    /// The resolved job; without its number of workers, which changes nothing.
    pub job: JobSpec,
    /// SHA-256 of the base (names and hashes of `config.json` and the safetensors files).
    pub base_sha256: String,
    /// SHA-256 of the training file.
    pub train_sha256: String,
    /// SHA-256 of the evaluation file.
    pub eval_sha256: Option<String>,
    /// SHA-256 over the dataset rows of every micro-batch of every step, in order, as u64 (little endian).
    pub order_sha256: String,
    /// Parameters trained.
    pub trainable_parameters: u64,
    /// Step whose parameters the adapter holds.
    pub adapter_step: u64,
    /// SHA-256 of `adapter_model.safetensors`.
    pub adapter_sha256: String,
    /// Every other file of the result.
    pub files: Vec<FileHash>,
    /// One record a step.
    pub steps: Vec<StepRecord>,
}

/// A file of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHash {
    /// Name in the output directory.
    pub name: String,
    /// SHA-256 of its contents.
    pub sha256: String,
}

/// The numbers of one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Step, from 1.
    pub step: u64,
    /// Mean loss a trained token, in nats; absent where it was not finite.
    pub loss: Option<f64>,
    /// 2-norm of the mean gradient before clipping; absent where the step was skipped.
    pub grad_norm: Option<f64>,
    /// Hash of parameters and moments after the step (128 bits, in hex).
    pub state: String,
    /// Mean evaluation loss a trained token, where the step was evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
}
