//! The section `workers` of a job.

use serde::{Deserialize, Serialize};

use crate::range::check_count;
use crate::{FieldError, TrainingSpec};

/// The number of workers of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkersSpec {
    /// The job starts when this many workers are available.
    pub min: usize,
    /// Maximum number of workers.
    pub max: usize,
}

impl Default for WorkersSpec {
    fn default() -> Self {
        Self { min: 1, max: 1 }
    }
}

impl WorkersSpec {
    /// Checks the number of workers. A worker of a step needs at least one of its micro-batches.
    pub(crate) fn check(&self, training: &TrainingSpec) -> Result<(), FieldError> {
        let fail = |message: String| Err(FieldError::new("workers.max", message));
        check_count("workers.min", self.min as u64, 1..)?;
        if self.min > self.max {
            return fail(format!("{} is less than workers.min {}", self.max, self.min));
        }
        let micro_batches = training.micro_batches();
        if self.max > micro_batches {
            return fail(format!(
                "{} workers are more than the {micro_batches} micro-batches of a step (global_batch_size {} \
                 / micro_batch_size {}); lower it to {micro_batches} or make micro_batch_size smaller",
                self.max, training.global_batch_size, training.micro_batch_size
            ));
        }
        Ok(())
    }
}
