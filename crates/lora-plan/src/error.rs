//! The error of a plan.

use lora_data::DataError;
use lora_spec::{FieldError, ModelConfigError, SafetensorsError};

/// The reason why a job cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A setting is invalid.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The base's `config.json` is invalid.
    #[error(transparent)]
    Config(#[from] ModelConfigError),
    /// The base's weights are invalid.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// The dataset, the tokenizer or the chat template is invalid.
    #[error(transparent)]
    Data(DataError),
}

impl From<DataError> for PlanError {
    fn from(error: DataError) -> Self {
        match error {
            DataError::Field(error) => Self::Field(error),
            other => Self::Data(other),
        }
    }
}
