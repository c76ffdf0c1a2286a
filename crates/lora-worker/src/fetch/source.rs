//! Files that are wanted, and the places they come from.

use std::path::Path;

use lora_proto::file_transfer::{self, TransferError};
use lora_proto::v1::download_request;
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;

use super::FetchError;
use super::hub::Snapshot;
use super::object_store::ObjectStorePrefix;

/// Files that belong together, from one place.
pub(super) struct FileSet {
    pub(super) source: Source,
    pub(super) files: Vec<RemoteFile>,
}

/// A file before it is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RemoteFile {
    /// Its path in the set.
    pub(super) name: String,
    /// Bytes.
    pub(super) size: u64,
    /// Names the content: the SHA-256 in hexadecimal where it is known.
    pub(super) key: String,
    /// What an object store calls the content.
    pub(super) etag: Option<String>,
}

/// Where files come from.
pub(super) enum Source {
    /// The coordinator's store, by SHA-256.
    Coordinator(Channel),
    Hub(Snapshot),
    ObjectStore(ObjectStorePrefix),
}

impl RemoteFile {
    /// The SHA-256, if the key is one.
    pub(super) fn sha256(&self) -> Option<Vec<u8>> {
        hex::decode(&self.key).ok().filter(|hash| hash.len() == 32)
    }
}

impl Source {
    /// Makes `path` the whole file, going on from what is there of it.
    pub(super) async fn download(&self, file: &RemoteFile, path: &Path) -> Result<(), FetchError> {
        match self {
            Self::Coordinator(channel) => {
                let source = download_request::Source::Sha256(file.sha256().unwrap_or_default());
                let got = file_transfer::download(channel.clone(), source, path, |_| {}).await;
                let fail = |source| FetchError::Transfer { file: file.name.clone(), source };
                match got.map_err(fail)?.hex() == file.key {
                    true => Ok(()),
                    false => Err(fail(TransferError::Corrupt)),
                }
            }
            Self::Hub(snapshot) => snapshot.download(file, path).await,
            Self::ObjectStore(prefix) => prefix.download(file, path).await,
        }
    }
}
