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
    #[error("{name}: {source}", name = name.display())]
    Io {
        /// Name of the file.
        name: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file of an adapter directory is invalid.
    #[error("{name}: {message}", name = name.display())]
    Adapter {
        /// Name of the file.
        name: PathBuf,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// A weight of a merged model would not be a number of its type.
    #[error("the merged weight of {module} would have the value {value}")]
    NotFinite {
        /// Name of the module.
        module: String,
        /// The value before it is rounded.
        value: f32,
    },
    /// An operation on tensors failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl ModelError {
    /// Creates an error about reading `file`.
    pub(crate) fn io(file: &SourceFile, source: std::io::Error) -> Self {
        Self::Io { name: file.name().to_owned(), source }
    }
}
