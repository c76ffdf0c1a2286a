use std::path::PathBuf;

use lora_spec::{FieldError, ModelConfigError, SafetensorsError, SourceFile};

/// An error of a base model or an adapter.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// `config.json` is invalid or not supported.
    #[error(transparent)]
    Config(#[from] ModelConfigError),
    /// The weights cannot be read, or do not match `config.json`.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// A setting of the job does not fit the model.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// A file cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Name of the file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file of an adapter directory is invalid.
    #[error("{path}: {message}", path = path.display())]
    Adapter {
        /// Name of the file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// An operation on tensors failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl ModelError {
    /// Creates an error about reading `file`.
    pub(crate) fn io(file: &SourceFile, source: std::io::Error) -> Self {
        Self::Io { path: file.name().to_owned(), source }
    }
}
