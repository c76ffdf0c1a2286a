//! The files of a result. The adapter's files are checked against the trained adapter's logits.

use std::path::Path;

use candle_core::DType;
use lora_data::Tokenizer;
use lora_model::{Adapter, Base, PeftAdapter, write_adapter};
use lora_spec::{JobSpec, MicroBatch, SourceFile, file_names};

use crate::error::TrainError;
use crate::logit_difference::LogitDifference;

/// A file of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultFile {
    /// Name in the output directory.
    pub name: String,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// Returns the files of `adapter` in PEFT's format, with its weights first, and how the logits of
/// the adapter in these files differ from those of `adapter`.
///
/// The returned bytes are parsed, and the parsed adapter must give the same logits for `rows` as
/// `adapter`. The logits must have the same bits, unless the adapter has an initial term: the
/// exported adapter includes this term, so that sums have another order, and small rounding errors
/// are allowed.
///
/// # Errors
/// The logits differ ([`TrainError::Export`]), or those of `adapter` are not finite.
pub(crate) fn adapter_files(
    job: &JobSpec,
    base: &Base,
    adapter: &Adapter,
    rows: &[MicroBatch],
) -> Result<(Vec<ResultFile>, LogitDifference), TrainError> {
    let path = job.model.base.to_string_lossy();
    let (name, revision) = job.model.hub_repository().unwrap_or((&path, None));
    let files = write_adapter(adapter, &job.adapter, name, revision)?;
    let [(_, weights), (_, config)] = &files;
    let reloaded = PeftAdapter::parse(&Path::new("export").into(), config, weights)?
        .to_adapter(&base.config)?
        .to_device_of(base)?;
    // In bf16, adding and subtracting the large initial term leaves rounding errors. A missing
    // matrix still exceeds the bound.
    let bound = match (adapter.initial(), base.activation_dtype()) {
        (None, _) => 0.0,
        (Some(_), DType::F32) => 1e-4,
        (Some(_), _) => 0.25,
    };
    let difference = LogitDifference::of_adapters(base, &reloaded, adapter, rows)?;
    if !difference.is_finite() {
        return Err(TrainError::ExportNotFinite);
    }
    if difference.relative() > bound {
        return Err(TrainError::Export { difference, bound });
    }
    let files = files.into_iter().map(|(name, bytes)| ResultFile { name: name.into(), bytes });
    Ok((files.collect(), difference))
}

/// Returns the files of `tokenizer`.
///
/// # Errors
/// A file cannot be read.
pub(crate) fn tokenizer_files(tokenizer: &Tokenizer) -> Result<Vec<ResultFile>, TrainError> {
    let read = |(name, file): &(String, SourceFile)| {
        let bytes = file.read().map_err(|source| TrainError::Io { name: file.name().to_owned(), source })?;
        Ok::<_, TrainError>(ResultFile { name: name.clone(), bytes })
    };
    // The template of the job replaces the base's.
    let template = tokenizer.template_of_job().map(|template| ResultFile {
        name: file_names::CHAT_TEMPLATE.to_owned(),
        bytes: template.as_bytes().to_vec(),
    });
    let of_base =
        |(name, _): &&(String, SourceFile)| template.is_none() || *name != file_names::CHAT_TEMPLATE;
    let mut files = tokenizer.files().iter().filter(of_base).map(read).collect::<Result<Vec<_>, _>>()?;
    files.extend(template);
    Ok(files)
}

#[cfg(test)]
mod tests {
    use lora_spec::{BaseLayout, Document};

    use super::*;
    use crate::device::ComputeDevice;

    #[test]
    fn an_export_with_other_logits_is_an_error() {
        let base = lora_test_kit::golden("models/llama-bf16").as_path().into();
        let base = Base::load(&base, BaseLayout::default(), &ComputeDevice::Cpu).unwrap();
        let mut job = JobSpec::default();
        let adapter = Adapter::new(&base.config, &job.adapter, 0).unwrap();
        let params: Vec<f32> = (0..adapter.params().elem_count()).map(|i| (i as f32).sin() * 0.05).collect();
        let adapter = adapter.with_params(params, None).unwrap();
        let row = MicroBatch {
            rows: Document::whole_rows([0], 3),
            seq_len: 3,
            tokens: vec![1, 2, 3],
            targets: vec![2, 3, 4],
            weights: vec![1.0; 3],
        };
        let rows = [row];
        let (files, difference) = adapter_files(&job, &base, &adapter, &rows).unwrap();
        assert_eq!((files.len(), difference.tokens, difference.largest_difference), (2, 3, 0.0));
        // The configuration file has another scaling than the adapter was trained with.
        job.adapter.lora_alpha *= 2.0;
        let error = adapter_files(&job, &base, &adapter, &rows).unwrap_err();
        assert!(matches!(error, TrainError::Export { .. }), "{error}");
        assert!(error.to_string().contains("differ by up to"), "{error}");
    }
}
