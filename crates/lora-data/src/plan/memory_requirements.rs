//! What a worker of a job needs in memory, and which settings would make it need less.

use std::path::Path;

use lora_spec::{
    ActivationCheckpointing, FieldError, JobSpec, MemoryEstimate, MicroBatchShape, ModelConfig,
    ModelFootprint, QuantizationType, SafetensorsIndex, StoredWeight, TrainingWorkload, format_bytes,
};
use serde::{Deserialize, Serialize};

use super::PlanError;
use crate::Dataset;
use crate::batch::PAD_MULTIPLE;

/// Peak of each of the fewest workers that a job can have.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PlanMemory {
    /// Of a worker on a CPU.
    pub cpu: MemoryEstimate,
    /// Of a GPU's memory, CUDA's own not counted.
    pub gpu: MemoryEstimate,
}

/// What each of the fewest workers needs with the job's settings, and with others: enough to say of any worker whether it can have
/// the job, and why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRequirements {
    cpu: DeviceRequirements,
    gpu: DeviceRequirements,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DeviceRequirements {
    peak: u64,
    base: u64,
    /// Ways to need less, those that compute least first; of each its micro-batches, the largest first.
    #[serde(rename = "ways")]
    alternatives: Vec<Vec<Alternative>>,
}

/// Settings with which a worker would need less.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Alternative {
    /// Keys and values.
    settings: Vec<(String, String)>,
    /// Peak with them, in bytes.
    peak: u64,
}

impl MemoryRequirements {
    /// What a worker needs of `job` over the base in the directory `base`, with these training rows. Reads no weights.
    pub fn new(job: &JobSpec, base: &Path, train: &Dataset) -> Result<Self, PlanError> {
        let model = ModelConfig::read(base)?;
        let index = SafetensorsIndex::open(base)?;
        job.adapter.check_base(&model, &index)?;
        Ok(PlanInputs { model, index, longest: train.report.longest, rows: train.rows.len() }
            .requirements(job)?)
    }

    /// Bytes that a worker needs, of a GPU or (`gpu` false) of its machine.
    pub fn peak(&self, gpu: bool) -> u64 {
        self.for_device(gpu).peak
    }

    /// Why a worker with `limit` bytes cannot have the job, and up to three changes of settings with which it could, the smallest
    /// ones first; `None`: it can.
    pub fn too_large(&self, limit: u64, gpu: bool) -> Option<String> {
        let DeviceRequirements { peak, base, alternatives } = self.for_device(gpu);
        if *peak <= limit {
            return None;
        }
        // Of the micro-batches that fit the largest.
        let mut fitting: Vec<&Alternative> = alternatives
            .iter()
            .filter_map(|sizes| sizes.iter().find(|alternative| alternative.peak <= limit))
            .collect();
        fitting.sort_by_key(|alternative| alternative.settings.len());
        fitting.truncate(3);
        let settings = fitting.iter().map(|alternative| {
            let settings = alternative.settings.iter().map(|(key, value)| format!("{key}: {value}"));
            format!("{} ({})", settings.collect::<Vec<_>>().join(" and "), format_bytes(alternative.peak))
        });
        let would = match fitting.is_empty() {
            true => format!(
                "no activation_checkpointing, micro_batch_size or quantization would make it fit, the base alone takes {}",
                format_bytes(*base)
            ),
            false => format!("it would fit with {}", settings.collect::<Vec<_>>().join(", or with ")),
        };
        let of = if gpu { "of a GPU's memory" } else { "of memory" };
        let (peak, limit) = (format_bytes(*peak), format_bytes(limit));
        Some(format!("a worker needs {peak} {of}, more than {limit}; {would}"))
    }

    fn for_device(&self, gpu: bool) -> &DeviceRequirements {
        if gpu { &self.gpu } else { &self.cpu }
    }
}

/// What memory depends on beside the job's settings.
pub(super) struct PlanInputs {
    pub(super) model: ModelConfig,
    pub(super) index: SafetensorsIndex,
    /// Tokens of the longest training row.
    pub(super) longest: usize,
    /// Training rows.
    pub(super) rows: usize,
}

impl PlanInputs {
    pub(super) fn memory(&self, job: &JobSpec) -> Result<PlanMemory, FieldError> {
        Ok(PlanMemory { cpu: self.estimate(job, false)?, gpu: self.estimate(job, true)? })
    }

    /// The largest micro-batch, and how many a worker computes in a step.
    pub(super) fn shape(&self, job: &JobSpec) -> MicroBatchShape {
        let training = &job.training;
        let micro_batches = self.rows.min(training.global_batch_size).div_ceil(training.micro_batch_size);
        MicroBatchShape {
            rows: training.micro_batch_size.min(self.rows),
            // The last token is only predicted.
            positions: self.longest.saturating_sub(1).next_multiple_of(PAD_MULTIPLE),
            count: micro_batches.div_ceil(job.workers.min),
        }
    }

    fn estimate(&self, job: &JobSpec, gpu: bool) -> Result<MemoryEstimate, FieldError> {
        let training = &job.training;
        let footprint =
            ModelFootprint { model: &self.model, index: Some(&self.index), format: job.model.format(), gpu };
        let shape = self.shape(job);
        let modules = job.adapter.target_modules.resolve(&self.model)?;
        Ok(footprint.memory(&TrainingWorkload {
            modules: &modules,
            adapter: &job.adapter,
            shape,
            checkpointing: training.activation_checkpointing,
            optim: training.optim,
            keeps_best: training.load_best_model_at_end,
        }))
    }

    pub(super) fn requirements(&self, job: &JobSpec) -> Result<MemoryRequirements, FieldError> {
        Ok(MemoryRequirements {
            cpu: self.device_requirements(job, false)?,
            gpu: self.device_requirements(job, true)?,
        })
    }

    fn device_requirements(&self, job: &JobSpec, gpu: bool) -> Result<DeviceRequirements, FieldError> {
        let now = (job.training.activation_checkpointing, job.training.micro_batch_size);
        let kept = [
            ActivationCheckpointing::None,
            ActivationCheckpointing::BlockSaveAttention,
            ActivationCheckpointing::Block,
        ];
        let less_kept = kept.into_iter().skip_while(|it| *it != now.0);
        let sizes: Vec<usize> =
            std::iter::successors(Some(now.1), |size| (*size > 1).then_some(size / 2)).collect();
        let quantizations = match job.model.quantization {
            QuantizationType::None if self.is_dense() => vec![QuantizationType::None, QuantizationType::Nf4],
            given => vec![given],
        };
        let mut alternatives = Vec::new();
        for (checkpointing, quantization) in
            less_kept.flat_map(|it| quantizations.iter().map(move |quantization| (it, *quantization)))
        {
            let mut sizes_tried = Vec::new();
            for &size in &sizes {
                let mut changed = job.clone();
                changed.training.activation_checkpointing = checkpointing;
                changed.training.micro_batch_size = size;
                changed.model.quantization = quantization;
                let peak = self.estimate(&changed, gpu)?.peak;
                sizes_tried.push(Alternative { settings: differences(job, &changed), peak });
            }
            alternatives.push(sizes_tried);
        }
        let MemoryEstimate { peak, base, .. } = self.estimate(job, gpu)?;
        Ok(DeviceRequirements { peak, base, alternatives })
    }

    fn is_dense(&self) -> bool {
        let modules = self.model.linear_modules();
        modules.iter().all(|module| matches!(self.index.weight(module), Ok(StoredWeight::Dense)))
    }
}

fn differences(job: &JobSpec, changed: &JobSpec) -> Vec<(String, String)> {
    let json = |job: &JobSpec| serde_json::to_value(job).unwrap_or_default();
    let (before, after) = (json(job), json(changed));
    ["model.quantization", "training.activation_checkpointing", "training.micro_batch_size"]
        .into_iter()
        .filter_map(|key| {
            let pointer = format!("/{}", key.replace('.', "/"));
            let (before, after) = (before.pointer(&pointer)?, after.pointer(&pointer)?);
            let text = after.as_str().map_or_else(|| after.to_string(), str::to_owned);
            (before != after).then(|| (key.to_owned(), text))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alternative(settings: &[(&str, &str)], peak: u64) -> Alternative {
        let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Alternative { settings: settings.collect(), peak }
    }

    #[test]
    fn too_small_workers_get_settings_that_would_fit() {
        const MIB: u64 = 1 << 20;
        let (size, block) = ("training.micro_batch_size", ("training.activation_checkpointing", "block"));
        let alternatives = vec![
            vec![
                alternative(&[], 90 * MIB),
                alternative(&[(size, "2")], 70 * MIB),
                alternative(&[(size, "1")], 60 * MIB),
            ],
            vec![alternative(&[block], 65 * MIB), alternative(&[block, (size, "2")], 55 * MIB)],
        ];
        let cpu = DeviceRequirements { peak: 90 * MIB, base: 50 * MIB, alternatives };
        let requirements =
            MemoryRequirements { gpu: DeviceRequirements { peak: 91 * MIB, ..cpu.clone() }, cpu };
        assert_eq!(requirements.too_large(90 * MIB, false), None);
        assert_eq!(
            requirements.too_large(64 * MIB, false).as_deref(),
            Some(
                "a worker needs 90.00 MiB of memory, more than 64.00 MiB; it would fit with \
                 training.micro_batch_size: 1 (60.00 MiB), or with training.activation_checkpointing: block and \
                 training.micro_batch_size: 2 (55.00 MiB)"
            )
        );
        assert_eq!(
            requirements.too_large(MIB, true).as_deref(),
            Some(
                "a worker needs 91.00 MiB of a GPU's memory, more than 1.00 MiB; no activation_checkpointing, \
                 micro_batch_size or quantization would make it fit, the base alone takes 50.00 MiB"
            )
        );
        let stored = serde_json::to_string(&requirements).unwrap();
        // Databases of older versions have these keys.
        assert!(stored.starts_with(r#"{"cpu":{"peak":94371840,"base":"#), "{stored}");
        assert!(stored.contains(r#""ways":[[{"settings":[],"peak":"#), "{stored}");
        assert_eq!(serde_json::from_str::<MemoryRequirements>(&stored).unwrap(), requirements);
    }
}
