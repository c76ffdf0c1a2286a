//! The ways to a base model that was not uploaded.

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
const SUPPORTED: &str = "hf://org/name[@revision], s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, or an \
                         absolute path under the worker's model_roots";

/// Where a base is.
pub(super) enum BaseSource {
    Local(PathBuf),
    Remote(FileSet),
}

/// What this worker may use as a base.
pub(super) struct BaseResolver {
    model_roots: Vec<PathBuf>,
    hub: Arc<Hub>,
    /// Settings of object stores by their environment names. They hold secrets.
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
                let message = format!("{} is no absolute path", root.display());
                return Err(FetchError::refused("model_roots", message));
            }
            if let Err(error) = root.canonicalize() {
                warn!(path = %root.display(), %error, "a directory of model_roots cannot be used");
            }
        }
        Ok(Self { model_roots, hub: Arc::new(hub), stores })
    }

    /// The directory `path`, free of symbolic links.
    pub(super) fn at_path(&self, path: &Path) -> Result<PathBuf, FetchError> {
        let shown = path.display();
        if !path.is_absolute() {
            return Err(FetchError::refused(FIELD, format!("{shown} is no absolute path")));
        }
        let outside = |what: &str| {
            let roots: Vec<String> = self.model_roots.iter().map(|root| root.display().to_string()).collect();
            let roots = if roots.is_empty() { "there are none".to_owned() } else { roots.join(", ") };
            let message =
                format!("{shown} {what} this worker's model_roots ({roots}); use one there, or a URL");
            FetchError::refused(FIELD, message)
        };
        let is_below =
            |path: &Path, root: &PathBuf| root.canonicalize().is_ok_and(|root| path.starts_with(root));
        match path.canonicalize() {
            Ok(real) if !self.model_roots.iter().any(|root| is_below(&real, root)) => {
                Err(outside("is not under"))
            }
            Ok(real) if !real.is_dir() => Err(FetchError::refused(FIELD, format!("{shown} is no directory"))),
            Ok(real) => Ok(real),
            // What lies elsewhere is nobody's business, not even whether it exists.
            Err(_) => Err(outside("is no directory under")),
        }
    }

    /// The files of the base at `url`.
    pub(super) async fn at_url(&self, url: &str, cache: &CacheDir) -> Result<FileSet, FetchError> {
        let refused = |message: String| Err(FetchError::refused(FIELD, message));
        if let Some(repository) = url.strip_prefix("hf://") {
            return match Repository::parse(repository) {
                Some(repository) => self.hub.file_set(&repository, cache).await,
                // It is not shown: it may hold a secret.
                None => refused("an hf:// URL is of the form hf://org/name[@revision]".to_owned()),
            };
        }
        // No part of the URL is shown before it is known to hold no secret.
        let parsed = match Url::parse(url) {
            Ok(parsed) => parsed,
            Err(error) => return refused(format!("is no URL: {error}; supported: {SUPPORTED}")),
        };
        let has_user = !parsed.username().is_empty() && parsed.scheme() != "az";
        if has_user || parsed.password().is_some() || parsed.query().is_some() || parsed.fragment().is_some()
        {
            return refused(
                "a URL with a user, a password or a query is not taken: credentials come from the workers' environment"
                    .to_owned(),
            );
        }
        match parsed.scheme() {
            "s3" | "gs" | "az" | "https" if parsed.has_host() => {
                object_store::file_set(&parsed, &self.stores, cache).await
            }
            "s3" | "gs" | "az" => refused(format!("{url} names no bucket")),
            "file" => refused(format!("{url} is not taken: give the path itself, {}", parsed.path())),
            scheme => refused(format!("{scheme}:// is not supported; supported: {SUPPORTED}")),
        }
    }
}
