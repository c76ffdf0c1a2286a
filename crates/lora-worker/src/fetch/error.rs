use std::io;
use std::path::{Path, PathBuf};

use lora_proto::file_transfer::TransferError;

/// The reason why an input cannot be fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// The job's request is invalid.
    #[error("{field}: {message}")]
    Refused {
        /// The job's field, or the setting.
        field: &'static str,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// A transfer from the coordinator failed.
    #[error("{file}: {source}")]
    Transfer {
        /// The file's name.
        file: String,
        /// The cause.
        source: TransferError,
    },
    /// An operation on a local file failed.
    #[error("{path}: {source}", path = path.display())]
    Local {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A fetch from the hub or an object store failed. The text contains no credentials.
    #[error("model.base: {from}: {message}")]
    Remote {
        /// The base's URL, or a file of it.
        from: String,
        /// The cause.
        message: String,
        /// Whether a later attempt may succeed.
        transient: bool,
    },
    /// Another worker on this machine is fetching the file, but makes no progress.
    #[error("{file}: another worker on this machine is fetching it but makes no progress")]
    Busy {
        /// The file's name.
        file: String,
    },
}

impl FetchError {
    /// Whether a later attempt may succeed.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Local { .. } => false,
            Self::Transfer { source, .. } => source.is_transient(),
            Self::Remote { transient, .. } => *transient,
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

    /// An error after which a later attempt may succeed.
    pub(super) fn transient(from: &str, message: impl Into<String>) -> Self {
        Self::Remote { from: from.to_owned(), message: message.into(), transient: true }
    }

    /// An error that later attempts would repeat.
    #[cfg(feature = "remote-base")]
    pub(super) fn permanent(from: &str, message: impl Into<String>) -> Self {
        Self::Remote { from: from.to_owned(), message: message.into(), transient: false }
    }
}
