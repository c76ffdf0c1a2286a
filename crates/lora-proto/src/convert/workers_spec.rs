//! The section `workers` of a job. Missing settings get the defaults of `lora-spec`.

use lora_spec::{FieldError, WorkersSpec};

use super::field::count;
use crate::v1;

impl TryFrom<v1::WorkersSpec> for WorkersSpec {
    type Error = FieldError;

    fn try_from(workers: v1::WorkersSpec) -> Result<Self, FieldError> {
        let v1::WorkersSpec { min, max } = workers;
        let default = WorkersSpec::default();
        Ok(Self {
            min: count("workers.min", min, default.min)?,
            max: count("workers.max", max, default.max)?,
        })
    }
}

impl From<&WorkersSpec> for v1::WorkersSpec {
    fn from(workers: &WorkersSpec) -> Self {
        Self { min: Some(workers.min as u64), max: Some(workers.max as u64) }
    }
}
