//! The receipt of a result: hashes of the inputs and outputs, and the numbers of every step.
//!
//! A receipt contains nothing that depends on time or on the number of workers: the same job with
//! the same paths gives the same receipt.

use std::path::Path;

use lora_model::sha256_file;
use lora_spec::JobSpec;
use lora_spec::file_names::{ADAPTER_WEIGHTS, RECEIPT};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::logit_difference::LogitDifference;

/// The contents of `receipt.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// Version of this format.
    pub format: u32,
    /// What the bits depend on besides the job: build and instruction set, or GPU.
    pub numerics_id: String,
    /// The resolved job, without its number of workers, on which no result depends.
    pub job: JobSpec,
    /// SHA-256 of the base (names and hashes of `config.json` and the safetensors files).
    pub base_sha256: String,
    /// SHA-256 of the training file; of several files, or with weights, a hash over theirs.
    pub train_sha256: String,
    /// SHA-256 of each training file, if there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub train_files_sha256: Vec<String>,
    /// SHA-256 of the evaluation file.
    pub eval_sha256: Option<String>,
    /// SHA-256 over the dataset rows of every micro-batch of every step, in order, as u64 (little
    /// endian).
    pub order_sha256: String,
    /// Number of trained parameters.
    pub trainable_parameters: u64,
    /// Step whose parameters were exported.
    pub adapter_step: u64,
    /// SHA-256 of `adapter_model.safetensors`.
    pub adapter_sha256: String,
    /// All other files of the result.
    pub files: Vec<FileHash>,
    /// How the logits of the adapter in the result's files differ from those of the trained one, on
    /// the first rows of the evaluation data, or of the training data if there is none. Receipts of
    /// earlier versions do not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<LogitDifference>,
    /// One record for each step.
    pub steps: Vec<StepRecord>,
}

impl Receipt {
    /// Iterates over the files of the result, with their SHA-256.
    pub fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        let others = self.files.iter().map(|file| (file.name.as_str(), file.sha256.as_str()));
        std::iter::once((ADAPTER_WEIGHTS, self.adapter_sha256.as_str())).chain(others)
    }

    /// Checks that the files in `dir` are those of the result.
    ///
    /// # Errors
    /// A file cannot be read, or was changed ([`TrainError::Receipt`]).
    pub fn check_files(&self, dir: &Path) -> Result<(), TrainError> {
        for (name, expected) in self.files() {
            let found = sha256_file(&dir.join(name).into())?;
            if found != expected {
                return Err(TrainError::Receipt(format!(
                    "{}: {name} was changed: its SHA-256 is {found}, not {expected}",
                    dir.join(RECEIPT).display()
                )));
            }
        }
        Ok(())
    }
}

/// A file of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHash {
    /// Name in the output directory.
    pub name: String,
    /// SHA-256 of the contents.
    pub sha256: String,
}

/// The recorded numbers of one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Number of the step, from 1.
    pub step: u64,
    /// Mean loss per trained token, in nats; absent if it was not finite.
    pub loss: Option<f64>,
    /// 2-norm of the mean gradient before clipping; absent if the step was skipped.
    pub grad_norm: Option<f64>,
    /// Hash of parameters and moments after the step (128 bits in hexadecimal).
    pub state: String,
    /// Mean evaluation loss per trained token, if an evaluation followed the step and its loss is
    /// finite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
}

/// SHA-256 of the inputs of a run, as in [`Receipt`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InputHashes {
    pub(crate) base: String,
    pub(crate) train: String,
    pub(crate) train_files: Vec<String>,
    pub(crate) eval: Option<String>,
    pub(crate) order: String,
}
