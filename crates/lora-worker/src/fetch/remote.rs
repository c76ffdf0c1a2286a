//! Bases at URLs: in the Hugging Face Hub and in object stores.

pub(super) mod hub;
pub(super) mod object_store;
mod selection;

use std::env;
use std::path::Path;
use std::sync::Arc;

use lora_proto::{DigestBuilder, PartialFile};
use reqwest::Url;

use self::hub::{Hub, Repository};
use super::FetchError;
use super::cache::CacheDir;
use super::model_roots::FIELD;
use super::source::{FileSet, RemoteFile};

const SUPPORTED: &str = "hf://org/name[@revision], s3://bucket/prefix, gs://bucket/prefix, \
                         az://container/prefix, or an absolute path under the worker's model_roots";

/// Finds bases at URLs.
pub(super) struct RemoteBases {
    hub: Arc<Hub>,
    /// Settings of object stores under their names in the environment. The values contain secrets.
    stores: Vec<(String, String)>,
}

impl RemoteBases {
    pub(super) fn new(hub: Hub, stores: Vec<(String, String)>) -> Self {
        // The HTTP clients use the process's provider. If one is installed already, it serves as
        // well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { hub: Arc::new(hub), stores }
    }

    /// The hub's address and token come from `HF_ENDPOINT` and `HF_TOKEN`. Object stores are
    /// configured by `AWS_*`, `GOOGLE_*` and `AZURE_*`.
    pub(super) fn from_environment() -> Self {
        let hub = Hub::new(env::var("HF_ENDPOINT").ok(), env::var("HF_TOKEN").ok());
        let stores = env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix)))
            .collect();
        Self::new(hub, stores)
    }

    /// Returns the files of the base at `url`.
    pub(super) async fn file_set(&self, url: &str, cache: &CacheDir) -> Result<FileSet, FetchError> {
        let refused = |message: String| Err(FetchError::refused(FIELD, message));
        if let Some(repository) = url.strip_prefix("hf://") {
            return match Repository::parse(repository) {
                Some(repository) => self.hub.file_set(&repository, cache).await,
                // The URL is not shown, because it may contain a secret.
                None => refused("an hf:// URL must have the form hf://org/name[@revision]".to_owned()),
            };
        }
        // No part of the URL is shown before the checks for secrets.
        let parsed = match Url::parse(url) {
            Ok(parsed) => parsed,
            Err(error) => return refused(format!("is not a URL: {error}; supported: {SUPPORTED}")),
        };
        let has_user = !parsed.username().is_empty() && parsed.scheme() != "az";
        if has_user || parsed.password().is_some() || parsed.query().is_some() || parsed.fragment().is_some()
        {
            return refused(
                "a URL with a user, a password or a query is not accepted; credentials come from the \
                 workers' environment"
                    .to_owned(),
            );
        }
        match parsed.scheme() {
            "s3" | "gs" | "az" | "https" if parsed.has_host() => {
                self::object_store::file_set(&parsed, &self.stores, cache).await
            }
            "s3" | "gs" | "az" => refused(format!("{url} has no bucket")),
            "file" => refused(format!("{url} is not accepted; use the path itself, {}", parsed.path())),
            scheme => refused(format!("{scheme}:// is not supported; supported: {SUPPORTED}")),
        }
    }
}

/// Returns the key of content without a known SHA-256, derived from `identity`.
fn key(kind: &str, identity: &[impl AsRef<str>]) -> String {
    let lines: Vec<&str> = identity.iter().map(AsRef::as_ref).collect();
    format!("{kind}-{}", DigestBuilder::of_bytes(lines.join("\n").as_bytes()).hex())
}

/// Compares the file at `path` with the size and hash that were announced for `from`. A file that
/// is too long, or that has the right length but other bytes, is emptied.
async fn finish(
    mut partial: PartialFile,
    path: &Path,
    remote_file: &RemoteFile,
    from: &str,
) -> Result<(), FetchError> {
    let (size, expected) = (partial.size(), remote_file.size);
    if size < expected {
        let message = format!("the connection ended after {size} of {expected} bytes");
        return Err(FetchError::transient(from, message));
    }
    let same = remote_file.sha256().is_none_or(|sha256| partial.digest().sha256 == sha256);
    if size > expected || !same {
        partial.restart().await.map_err(FetchError::at(path))?;
        return Err(FetchError::transient(from, "the received file is corrupt; try again"));
    }
    partial.sync().await.map_err(FetchError::at(path))
}
