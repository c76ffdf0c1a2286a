//! Finds a base model that was not uploaded.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use reqwest::Url;
use tracing::warn;

use super::FetchError;
use super::cache::CacheDir;
use super::hub::{Hub, Repository};
use super::object_store;
use super::source::FileSet;

const FIELD: &str = "model.base";
const SUPPORTED: &str = "hf://org/name[@revision], s3://bucket/prefix, gs://bucket/prefix, \
                         az://container/prefix, or an absolute path under the worker's model_roots";

/// Where a base comes from.
pub(super) enum BaseSource {
    Local(PathBuf),
    Remote(FileSet),
}

/// Finds bases, within the limits of this worker's settings.
pub(super) struct BaseResolver {
    model_roots: Vec<PathBuf>,
    hub: Arc<Hub>,
    /// Settings of object stores under their names in the environment. The values contain secrets.
    stores: Vec<(String, String)>,
}

impl BaseResolver {
    pub(super) fn new(
        model_roots: Vec<PathBuf>,
        hub: Hub,
        stores: Vec<(String, String)>,
    ) -> Result<Self, FetchError> {
        for root in &model_roots {
            if !root.is_absolute() {
                let message = format!("{} is not an absolute path", root.display());
                return Err(FetchError::refused("model_roots", message));
            }
            if let Err(error) = root.canonicalize() {
                warn!(path = %root.display(), %error, "a directory of model_roots cannot be used");
            }
        }
        Ok(Self { model_roots, hub: Arc::new(hub), stores })
    }

    /// Returns the directory `path` with its symbolic links resolved.
    pub(super) fn at_path(&self, path: &Path) -> Result<PathBuf, FetchError> {
        let shown = path.display();
        if !path.is_absolute() {
            return Err(FetchError::refused(FIELD, format!("{shown} is not an absolute path")));
        }
        let outside = |problem: &str| {
            let roots: Vec<String> = self.model_roots.iter().map(|root| root.display().to_string()).collect();
            let roots = if roots.is_empty() { "none are set".to_owned() } else { roots.join(", ") };
            let message = format!(
                "{shown} {problem} this worker's model_roots ({roots}); it must be a directory under one of \
                 them, or a URL"
            );
            FetchError::refused(FIELD, message)
        };
        let is_below =
            |path: &Path, root: &PathBuf| root.canonicalize().is_ok_and(|root| path.starts_with(root));
        match path.canonicalize() {
            Ok(real) if !self.model_roots.iter().any(|root| is_below(&real, root)) => {
                Err(outside("is not under"))
            }
            Ok(real) if !real.is_dir() => {
                Err(FetchError::refused(FIELD, format!("{shown} is not a directory")))
            }
            Ok(real) => Ok(real),
            // The error does not reveal whether a path outside the roots exists.
            Err(_) => Err(outside("is not a directory under")),
        }
    }

    /// The files of the base at `url`.
    pub(super) async fn at_url(&self, url: &str, cache: &CacheDir) -> Result<FileSet, FetchError> {
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
                object_store::file_set(&parsed, &self.stores, cache).await
            }
            "s3" | "gs" | "az" => refused(format!("{url} has no bucket")),
            "file" => refused(format!("{url} is not accepted; use the path itself, {}", parsed.path())),
            scheme => refused(format!("{scheme}:// is not supported; supported: {SUPPORTED}")),
        }
    }
}
