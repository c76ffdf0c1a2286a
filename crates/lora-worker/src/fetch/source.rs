//! Files to fetch, and where they come from.

use std::path::Path;

use futures_util::future::BoxFuture;
use lora_proto::file_transfer::{self, TransferError};
use lora_proto::v1::download_request;
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;

use super::FetchError;

/// The source of files.
pub(super) trait Source: Send + Sync {
    /// Completes the file at `path`, resuming from the bytes that it has already.
    fn download<'a>(&'a self, file: &'a RemoteFile, path: &'a Path) -> BoxFuture<'a, Result<(), FetchError>>;
}

/// The coordinator's store, by SHA-256.
pub(super) struct CoordinatorStore(pub(super) Channel);

/// Files that belong together, from one source.
pub(super) struct FileSet {
    pub(super) source: Box<dyn Source>,
    pub(super) files: Vec<RemoteFile>,
}

/// A file to fetch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RemoteFile {
    /// Its path in the set.
    pub(super) name: String,
    /// Bytes.
    pub(super) size: u64,
    /// The key of the content: the SHA-256 in hexadecimal if it is known.
    pub(super) key: String,
    /// The object store's entity tag of the content.
    pub(super) etag: Option<String>,
}

impl RemoteFile {
    /// The SHA-256, if the key is one.
    pub(super) fn sha256(&self) -> Option<Vec<u8>> {
        hex::decode(&self.key).ok().filter(|hash| hash.len() == 32)
    }
}

impl Source for CoordinatorStore {
    fn download<'a>(&'a self, file: &'a RemoteFile, path: &'a Path) -> BoxFuture<'a, Result<(), FetchError>> {
        Box::pin(async move {
            let source = download_request::Source::Sha256(file.sha256().unwrap_or_default());
            let got = file_transfer::download(self.0.clone(), source, path, |_| {}).await;
            let fail = |source| FetchError::Transfer { file: file.name.clone(), source };
            match got.map_err(fail)?.hex() == file.key {
                true => Ok(()),
                false => Err(fail(TransferError::Corrupt)),
            }
        })
    }
}
