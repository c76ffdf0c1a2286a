//! The settings of a job, their defaults, and the checks that read no files.
//!
//! A setting that also exists in PEFT's `LoraConfig` or Transformers' `TrainingArguments` has the
//! same name and meaning.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    AdapterSpec, BaseLayout, DataSpec, FieldError, InitLoraWeights, Loftq, ModelSpec, TrainingSpec,
    WorkersSpec,
};

/// The settings of a job, as in `job.yaml`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobSpec {
    /// Display name: letters, digits, `-`, `_` and `.`, at most 63 characters.
    pub name: String,
    /// The frozen base model.
    pub model: ModelSpec,
    /// The adapter that is trained.
    pub adapter: AdapterSpec,
    /// The training and evaluation data.
    pub data: DataSpec,
    /// The settings of training.
    pub training: TrainingSpec,
    /// The number of workers.
    pub workers: WorkersSpec,
}

impl JobSpec {
    /// Returns the layout of the base in memory.
    pub fn base_layout(&self) -> BaseLayout {
        let AdapterSpec { r, target_modules, init_lora_weights, loftq_iter: rounds, .. } = &self.adapter;
        let requantizes = *init_lora_weights == InitLoraWeights::Loftq && *rounds > 1;
        BaseLayout {
            format: self.model.format(),
            loftq: requantizes.then(|| Loftq {
                rounds: *rounds,
                r: *r,
                target_modules: target_modules.clone(),
            }),
        }
    }

    /// Joins the relative paths of the job to `dir`, the directory of the job file. A base that is
    /// a URL stays as it is.
    pub fn resolve_paths(&mut self, dir: &Path) {
        let set = |path: &mut PathBuf| *path = dir.join(&path);
        if self.model.base_url().is_none() {
            set(&mut self.model.base);
        }
        self.data.train.iter_mut().for_each(set);
        self.data.eval.as_mut().map(set);
        self.adapter.init_from.as_mut().map(set);
    }

    /// Returns an error about the first setting that differs from `earlier`, with both values. The
    /// number of workers does not change results, so it is not compared.
    pub fn difference(&self, earlier: &Self) -> Option<FieldError> {
        let json = |job: &Self| serde_json::to_value(job).unwrap_or_default();
        let (ours, theirs) = (json(self), json(earlier));
        crate::known_keys()
            .into_iter()
            .filter(|(key, section)| !section && !key.starts_with("workers."))
            .find_map(|(key, _)| {
                let pointer = format!("/{}", key.replace('.', "/"));
                let value = |job: &Value| job.pointer(&pointer).cloned().unwrap_or_default();
                let (given, kept) = (value(&ours), value(&theirs));
                let message = format!("is {given}, and was {kept}");
                (given != kept).then(|| FieldError::new(&key, message))
            })
    }

    /// Checks every value that can be checked without reading a file.
    ///
    /// # Errors
    /// The first invalid field.
    pub fn check(&self) -> Result<(), FieldError> {
        check_name(&self.name)?;
        self.model.check()?;
        self.adapter.check(&self.model)?;
        self.data.check()?;
        self.training.check(&self.data)?;
        self.workers.check(&self.training)
    }
}

fn check_name(name: &str) -> Result<(), FieldError> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 63 || !name.chars().all(legal) {
        let message = format!("{name:?} is not a name; it must be 1 to 63 letters, digits, '-', '_' or '.'");
        return Err(FieldError::new("name", message));
    }
    if name.starts_with('.') {
        let message = format!("{name:?} starts with a dot; start with another character");
        return Err(FieldError::new("name", message));
    }
    Ok(())
}
