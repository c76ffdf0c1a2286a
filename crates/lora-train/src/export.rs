//! The result of a run: the adapter, whose exported files are checked against the trained adapter's
//! logits, and its receipt.

use std::path::{Path, PathBuf};

use candle_core::DType;
use lora_data::{MicroBatchRows, collate};
use lora_model::{Adapter, PeftAdapter, logits, sha256, write_adapter};
use lora_ops::transfer::to_vec;
use lora_spec::{FieldError, ModelSpec, WorkersSpec};

use crate::receipt::{FileHash, Receipt};
use crate::{Run, TrainError, numerics_id};

/// A file of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultFile {
    /// Relative path in the output directory.
    pub name: String,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// Name of the adapter's weights.
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";

impl Run {
    /// Returns the files of the result: the adapter in PEFT's format, the tokenizer's files, and
    /// `receipt.json`.
    ///
    /// The returned bytes of the adapter are parsed, and the parsed adapter must give the same
    /// logits as the trained one. The logits must have the same bits, unless the adapter has an
    /// initial term: the exported adapter includes this term, so that sums have another order, and
    /// small rounding errors are allowed.
    ///
    /// # Errors
    /// The logits differ ([`TrainError::Export`]), or a file of the tokenizer cannot be read.
    pub fn export(&self) -> Result<Vec<ResultFile>, TrainError> {
        let progress = &self.progress;
        let last = self.engine.adapter();
        let (adapter, adapter_step) = match (&self.best_params, progress.best.best) {
            (Some(best), Some((_, step))) => (&last.with_params(best.clone(), None)?, step),
            _ => (last, progress.step),
        };
        let base = self.engine.base();
        let (name, revision) = hub_name(&self.job.model);
        let files = write_adapter(adapter, &self.job.adapter, &name, revision.as_deref())?;
        let [(_, weights), (_, config)] = &files;
        let reloaded = PeftAdapter::parse(Path::new("export"), config, weights)?
            .to_adapter(&base.config)?
            .to_device_of(base)?;
        // In bf16, adding and subtracting the large initial term leaves rounding errors. A missing
        // matrix still exceeds the tolerance.
        let tolerance = match (adapter.initial(), base.activation_dtype()) {
            (None, _) => 0.0,
            (Some(_), DType::F32) => 1e-4,
            (Some(_), _) => 0.25,
        };
        if !is_close(&self.sample_logits(&reloaded)?, &self.sample_logits(adapter)?, tolerance) {
            return Err(TrainError::Export);
        }
        let adapter_sha256 = sha256(weights);
        let mut artifacts: Vec<ResultFile> =
            files.into_iter().map(|(name, bytes)| ResultFile { name: name.into(), bytes }).collect();
        for name in self.tokenizer.files() {
            let path: PathBuf = base.dir.join(name);
            let bytes = std::fs::read(&path).map_err(|source| TrainError::Io { path, source })?;
            artifacts.push(ResultFile { name: name.to_string_lossy().into_owned(), bytes });
        }
        let file_hash =
            |artifact: &ResultFile| FileHash { name: artifact.name.clone(), sha256: sha256(&artifact.bytes) };
        let mut job = self.job.clone();
        job.workers = WorkersSpec::default();
        let receipt = Receipt {
            format: 1,
            numerics_id: numerics_id(base.device())?,
            job,
            base_sha256: base.sha256().to_owned(),
            train_sha256: self.train.sha256.clone(),
            eval_sha256: self.eval.as_ref().map(|eval| eval.sha256.clone()),
            order_sha256: self.order_sha256(self.completed_steps()),
            trainable_parameters: self.facts().trainable_parameters,
            adapter_step,
            adapter_sha256,
            files: artifacts.iter().filter(|a| a.name != WEIGHTS).map(file_hash).collect(),
            steps: progress.history.clone(),
        };
        let mut bytes = serde_json::to_vec_pretty(&receipt)
            .map_err(|e| FieldError::new("receipt.json", e.to_string()))?;
        bytes.push(b'\n');
        artifacts.push(ResultFile { name: "receipt.json".into(), bytes });
        Ok(artifacts)
    }

    /// Returns the logits of the first training row with `adapter`.
    fn sample_logits(&self, adapter: &Adapter) -> Result<Vec<f32>, TrainError> {
        let inputs = self.train.rows.first().map_or(1, |row| row.tokens.len().saturating_sub(1).max(1));
        let batch = collate(&self.train, &MicroBatchRows { rows: vec![0], padded_len: inputs });
        let logits = logits(self.engine.base(), Some(adapter), &batch)?;
        Ok(to_vec(&logits)?)
    }

    /// Returns the SHA-256 over the rows of the first `steps` steps, in order.
    pub(crate) fn order_sha256(&self, steps: u64) -> String {
        let rows = (0..steps).flat_map(|step| self.plan.step(step)).flat_map(|micro_batch| micro_batch.rows);
        sha256(&rows.flat_map(|row| (row as u64).to_le_bytes()).collect::<Vec<u8>>())
    }
}

/// Returns whether each element of `a` differs from that of `b` by less than `tolerance` times the
/// largest magnitude in `b`. With tolerance 0 all bits must be equal.
fn is_close(a: &[f32], b: &[f32], tolerance: f32) -> bool {
    let most = tolerance * b.iter().fold(0.0, |most: f32, b| most.max(b.abs()));
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || (a - b).abs() < most)
}

/// Returns `base_model_name_or_path` and `revision` for PEFT: the name on the Hub for a base from
/// the Hugging Face Hub, and the job's `model.base` for every other base.
fn hub_name(model: &ModelSpec) -> (String, Option<String>) {
    match model.base_url().and_then(|url| url.strip_prefix("hf://")) {
        Some(repository) => match repository.split_once('@') {
            Some((name, revision)) => (name.to_owned(), Some(revision.to_owned())),
            None => (repository.to_owned(), None),
        },
        None => (model.base.to_string_lossy().into_owned(), None),
    }
}

#[cfg(test)]
mod tests {
    use lora_spec::ModelSpec;

    use super::{hub_name, is_close};

    #[test]
    fn zero_tolerance_compares_bits() {
        assert!(is_close(&[1.0, -2.0], &[1.0, -2.0], 0.0));
        assert!(!is_close(&[1.0, -2.0], &[1.0, -2.000_000_2], 0.0));
        assert!(is_close(&[1.0, -2.0], &[1.0, -2.000_000_2], 1e-4));
        for wrong in [&[1.001, -2.0][..], &[f32::NAN, -2.0], &[1.0]] {
            assert!(!is_close(wrong, &[1.0, -2.0], 1e-4), "{wrong:?}");
        }
    }

    #[test]
    fn hub_bases_are_exported_by_their_hub_name() {
        let name = |base: &str| hub_name(&ModelSpec { base: base.into(), ..ModelSpec::default() });
        let revision = Some("1a2b".to_owned());
        assert_eq!(name("hf://org/name@1a2b"), ("org/name".into(), revision));
        assert_eq!(name("hf://org/name"), ("org/name".into(), None));
        assert_eq!(name("s3://bucket/base"), ("s3://bucket/base".into(), None));
        assert_eq!(name("/models/a@b"), ("/models/a@b".into(), None));
    }
}
