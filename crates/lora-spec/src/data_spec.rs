//! The section `data` of a job.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::range::check_count;

/// The training and evaluation data of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSpec {
    /// JSONL or Parquet file with training rows.
    pub train: PathBuf,
    /// JSONL or Parquet file with evaluation rows; `None`: no evaluation.
    pub eval: Option<PathBuf>,
    /// Maximum number of tokens of a row.
    pub max_length: usize,
    /// The handling of longer rows.
    pub long_rows: LongRows,
    /// Shuffle the rows again in each epoch (with `training.seed`).
    pub shuffle: bool,
}

impl Default for DataSpec {
    fn default() -> Self {
        Self { train: PathBuf::new(), eval: None, max_length: 512, long_rows: LongRows::Error, shuffle: true }
    }
}

/// The handling of rows longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongRows {
    /// Refuse the job with an error that names the rows.
    #[default]
    Error,
    /// Truncate the rows at the right end.
    Truncate,
    /// Drop the rows.
    Drop,
}

impl DataSpec {
    /// Checks every value that can be checked without reading a file.
    pub(crate) fn check(&self) -> Result<(), FieldError> {
        if self.train.as_os_str().is_empty() {
            return Err(FieldError::new("data.train", "is missing".into()));
        }
        check_count("data.max_length", self.max_length as u64, 1..)
    }
}
