//! Finds a base model on this machine.

use std::path::{Path, PathBuf};

use tracing::warn;

use super::FetchError;

/// The field that errors about a job's base name.
pub(super) const FIELD: &str = "model.base";

/// The directories under which jobs may use bases.
pub(super) struct ModelRoots(Vec<PathBuf>);

impl ModelRoots {
    /// # Errors
    /// A root is a relative path.
    pub(super) fn new(model_roots: Vec<PathBuf>) -> Result<Self, FetchError> {
        for root in &model_roots {
            if !root.is_absolute() {
                let message = format!("{} is not an absolute path", root.display());
                return Err(FetchError::refused("model_roots", message));
            }
            if let Err(error) = root.canonicalize() {
                warn!(path = %root.display(), %error, "a directory of model_roots cannot be used");
            }
        }
        Ok(Self(model_roots))
    }

    /// Returns the directory `path` with its symbolic links resolved.
    pub(super) fn resolve(&self, path: &Path) -> Result<PathBuf, FetchError> {
        let shown = path.display();
        if !path.is_absolute() {
            return Err(FetchError::refused(FIELD, format!("{shown} is not an absolute path")));
        }
        let outside = |problem: &str| {
            let roots: Vec<String> = self.0.iter().map(|root| root.display().to_string()).collect();
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
            Ok(real) if !self.0.iter().any(|root| is_below(&real, root)) => Err(outside("is not under")),
            Ok(real) if !real.is_dir() => {
                Err(FetchError::refused(FIELD, format!("{shown} is not a directory")))
            }
            Ok(real) => Ok(real),
            // The error does not reveal whether a path outside the roots exists.
            Err(_) => Err(outside("is not a directory under")),
        }
    }
}
