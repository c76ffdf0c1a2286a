//! Files that are wanted, and the places they come from.

use std::path::Path;

use lora_proto::file_transfer::{self, TransferError};
use lora_proto::v1::download_request::Source;
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;

use super::FetchError;
use super::bucket::Prefix;
use super::hub::Snapshot;

/// Files that belong together, from one place.
pub(super) struct Bundle {
    pub(super) origin: Origin,
    pub(super) files: Vec<Wanted>,
}

/// A file before it is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wanted {
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
pub(super) enum Origin {
    /// The coordinator's store, by SHA-256.
    Coordinator(Channel),
    Hub(Snapshot),
    Bucket(Prefix),
}

impl Wanted {
    /// The SHA-256, if the key is one.
    pub(super) fn sha256(&self) -> Option<Vec<u8>> {
        hex::decode(&self.key).ok().filter(|hash| hash.len() == 32)
    }
}

impl Origin {
    /// Makes `path` the whole file, going on from what is there of it.
    pub(super) async fn download(&self, file: &Wanted, path: &Path) -> Result<(), FetchError> {
        match self {
            Self::Coordinator(channel) => {
                let source = Source::Sha256(file.sha256().unwrap_or_default());
                let got = file_transfer::download(channel.clone(), source, path, |_| {}).await;
                let fail = |source| FetchError::Transfer { file: file.name.clone(), source };
                match got.map_err(fail)?.hex() == file.key {
                    true => Ok(()),
                    false => Err(fail(TransferError::Corrupt)),
                }
            }
            Self::Hub(snapshot) => snapshot.download(file, path).await,
            Self::Bucket(prefix) => prefix.download(file, path).await,
        }
    }
}
