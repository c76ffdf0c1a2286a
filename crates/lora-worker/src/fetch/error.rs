use std::io;
use std::path::{Path, PathBuf};

use lora_proto::file_transfer::TransferError;

/// Why an input cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// What the job asks for cannot be.
    #[error("{field}: {message}")]
    Refused {
        /// The setting, or what else.
        field: &'static str,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// From the coordinator.
    #[error("{file}: {source}")]
    Transfer {
        /// The file's name.
        file: String,
        /// Why not.
        source: TransferError,
    },
    /// On this machine.
    #[error("{path}: {source}", path = path.display())]
    Local {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// From the hub or an object store. Says no credentials.
    #[error("model.base: {from}: {message}")]
    Remote {
        /// The base's URL, or a file of it.
        from: String,
        /// Why not.
        message: String,
        /// It may work later.
        passing: bool,
    },
    /// Another worker of this machine fetches the file, and does not get on.
    #[error("{file}: another worker of this machine has been fetching it without getting on")]
    Busy {
        /// The file's name.
        file: String,
    },
}

impl FetchError {
    /// Whether the same call may work later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Local { .. } => false,
            Self::Transfer { source, .. } => source.is_transient(),
            Self::Remote { passing, .. } => *passing,
            Self::Busy { .. } => true,
        }
    }

    pub(super) fn refused(field: &'static str, message: impl Into<String>) -> Self {
        Self::Refused { field, message: message.into() }
    }

    /// For `map_err`: an error at `path`.
    pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::Local { path, source }
    }

    /// One that may work later.
    pub(super) fn transient(from: &str, message: impl Into<String>) -> Self {
        Self::Remote { from: from.to_owned(), message: message.into(), passing: true }
    }

    /// One that will not.
    pub(super) fn permanent(from: &str, message: impl Into<String>) -> Self {
        Self::Remote { from: from.to_owned(), message: message.into(), passing: false }
    }
}
