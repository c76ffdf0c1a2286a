//! The files of a result. The adapter's files are checked against the trained adapter's logits.

use std::path::Path;

use candle_core::DType;
use lora_data::Tokenizer;
use lora_model::{Adapter, Base, PeftAdapter, logits, write_adapter};
use lora_ops::transfer::to_vec;
use lora_spec::{JobSpec, MicroBatch, ModelSpec, SourceFile};

use crate::error::TrainError;

/// A file of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultFile {
    /// Name in the output directory.
    pub name: String,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// Returns the files of `adapter` in PEFT's format, with its weights first.
///
/// The returned bytes are parsed, and the parsed adapter must give the same logits for `sample` as
/// `adapter`. The logits must have the same bits, unless the adapter has an initial term: the
/// exported adapter includes this term, so that sums have another order, and small rounding errors
/// are allowed.
///
/// # Errors
/// The logits differ ([`TrainError::Export`]).
pub(crate) fn adapter_files(
    job: &JobSpec,
    base: &Base,
    adapter: &Adapter,
    sample: &MicroBatch,
) -> Result<Vec<ResultFile>, TrainError> {
    let (name, revision) = hub_name(&job.model);
    let files = write_adapter(adapter, &job.adapter, &name, revision.as_deref())?;
    let [(_, weights), (_, config)] = &files;
    let reloaded = PeftAdapter::parse(&Path::new("export").into(), config, weights)?
        .to_adapter(&base.config)?
        .to_device_of(base)?;
    // In bf16, adding and subtracting the large initial term leaves rounding errors. A missing
    // matrix still exceeds the tolerance.
    let tolerance = match (adapter.initial(), base.activation_dtype()) {
        (None, _) => 0.0,
        (Some(_), DType::F32) => 1e-4,
        (Some(_), _) => 0.25,
    };
    let sample_logits = |adapter| Ok::<Vec<f32>, TrainError>(to_vec(&logits(base, Some(adapter), sample)?)?);
    if !is_close(&sample_logits(&reloaded)?, &sample_logits(adapter)?, tolerance) {
        return Err(TrainError::Export);
    }
    Ok(files.into_iter().map(|(name, bytes)| ResultFile { name: name.into(), bytes }).collect())
}

/// Returns the files of `tokenizer`.
///
/// # Errors
/// A file cannot be read.
pub(crate) fn tokenizer_files(tokenizer: &Tokenizer) -> Result<Vec<ResultFile>, TrainError> {
    let read = |(name, file): &(String, SourceFile)| {
        let bytes = std::fs::read(file.path())
            .map_err(|source| TrainError::Io { name: file.name().to_owned(), source })?;
        Ok(ResultFile { name: name.clone(), bytes })
    };
    tokenizer.files().iter().map(read).collect()
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
