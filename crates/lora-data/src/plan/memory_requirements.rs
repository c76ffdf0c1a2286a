//! The memory that a worker of a job needs, and the settings with which it would need less.

use std::path::Path;

use lora_spec::{
    ActivationCheckpointing, DeviceKind, FieldError, JobSpec, MemoryEstimate, MemoryLimit, MicroBatchShape,
    ModelConfig, ModelFootprint, QuantizationType, SafetensorsIndex, StoredWeight, TrainingWorkload,
    format_bytes,
};
use serde::{Deserialize, Serialize};

use super::PlanError;
use crate::Dataset;
use crate::batch::PAD_MULTIPLE;

/// The memory of each worker if the job runs on `workers.min` workers.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PlanMemory {
    /// Memory of a worker on a CPU.
    pub cpu: MemoryEstimate,
    /// Memory on a GPU, without CUDA's own memory.
    pub gpu: MemoryEstimate,
}

/// The memory that each of `workers.min` workers needs with the job's settings and with alternative
/// settings. It is stored with the job, to decide whether a worker's memory is enough and to name
/// settings that would fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRequirements {
    cpu: DeviceRequirements,
    gpu: DeviceRequirements,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DeviceRequirements {
    peak: u64,
    base: u64,
    /// Alternative settings that need less memory, in the order of their additional computation.
    /// Each entry has the micro-batch sizes, the largest first.
    #[serde(rename = "ways")]
    alternatives: Vec<Vec<Alternative>>,
}

/// Settings with which a worker would need less memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Alternative {
    /// Keys and values of the settings that change.
    settings: Vec<(String, String)>,
    /// Peak with these settings, in bytes.
    peak: u64,
}

impl MemoryRequirements {
    /// Computes the requirements of `job` over the base in the directory `base`, with these
    /// training rows. Does not read weights.
    ///
    /// # Errors
    /// The base or the adapter's settings are invalid.
    pub fn new(job: &JobSpec, base: &Path, train: &Dataset) -> Result<Self, PlanError> {
        let model = ModelConfig::read(base)?;
        let index = SafetensorsIndex::open(base)?;
        job.adapter.check_base(&model, &index)?;
        Ok(PlanInputs { model, index, longest: train.report.longest, rows: train.rows.len() }
            .requirements(job)?)
    }

    /// Returns the bytes that a worker with a device of this kind needs.
    pub fn peak(&self, device: DeviceKind) -> u64 {
        self.for_device(device).peak
    }

    /// Returns why a job is too large for a worker with this limit, with up to three changes of
    /// settings with which the job would fit, those with the fewest settings first. Returns `None`
    /// if the job fits.
    pub fn too_large(&self, limit: MemoryLimit) -> Option<String> {
        let MemoryLimit { bytes: limit, device } = limit;
        let DeviceRequirements { peak, base, alternatives } = self.for_device(device);
        if *peak <= limit {
            return None;
        }
        // For each alternative, the largest micro-batch that fits.
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
                "no activation_checkpointing, micro_batch_size or quantization would make it fit, \
                 the base alone takes {}",
                format_bytes(*base)
            ),
            false => format!("it would fit with {}", settings.collect::<Vec<_>>().join(", or with ")),
        };
        let of = match device {
            DeviceKind::Gpu => "of a GPU's memory",
            DeviceKind::Cpu => "of memory",
        };
        let (peak, limit) = (format_bytes(*peak), format_bytes(limit));
        Some(format!("a worker needs {peak} {of}, more than {limit}; {would}"))
    }

    fn for_device(&self, device: DeviceKind) -> &DeviceRequirements {
        match device {
            DeviceKind::Cpu => &self.cpu,
            DeviceKind::Gpu => &self.gpu,
        }
    }
}

/// The inputs of a plan's memory, in addition to the job's settings.
pub(super) struct PlanInputs {
    pub(super) model: ModelConfig,
    pub(super) index: SafetensorsIndex,
    /// Number of tokens of the longest training row.
    pub(super) longest: usize,
    /// Number of training rows.
    pub(super) rows: usize,
}

impl PlanInputs {
    pub(super) fn memory(&self, job: &JobSpec) -> Result<PlanMemory, FieldError> {
        Ok(PlanMemory {
            cpu: self.estimate(job, DeviceKind::Cpu)?,
            gpu: self.estimate(job, DeviceKind::Gpu)?,
        })
    }

    /// Returns the shape of the largest micro-batch, and the number of micro-batches that a worker
    /// computes in a step.
    pub(super) fn shape(&self, job: &JobSpec) -> MicroBatchShape {
        let training = &job.training;
        let micro_batches = self.rows.min(training.global_batch_size).div_ceil(training.micro_batch_size);
        MicroBatchShape {
            rows: training.micro_batch_size.min(self.rows),
            // The last token is only a target.
            positions: self.longest.saturating_sub(1).next_multiple_of(PAD_MULTIPLE),
            count: micro_batches.div_ceil(job.workers.min),
        }
    }

    fn estimate(&self, job: &JobSpec, device: DeviceKind) -> Result<MemoryEstimate, FieldError> {
        let training = &job.training;
        let footprint = ModelFootprint {
            model: &self.model,
            index: Some(&self.index),
            format: job.model.format(),
            device,
        };
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
            cpu: self.device_requirements(job, DeviceKind::Cpu)?,
            gpu: self.device_requirements(job, DeviceKind::Gpu)?,
        })
    }

    fn device_requirements(
        &self,
        job: &JobSpec,
        device: DeviceKind,
    ) -> Result<DeviceRequirements, FieldError> {
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
                let peak = self.estimate(&changed, device)?.peak;
                sizes_tried.push(Alternative { settings: differences(job, &changed), peak });
            }
            alternatives.push(sizes_tried);
        }
        let MemoryEstimate { peak, base, .. } = self.estimate(job, device)?;
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
        let too_large = |bytes, device| requirements.too_large(MemoryLimit { bytes, device });
        assert_eq!(too_large(90 * MIB, DeviceKind::Cpu), None);
        assert_eq!(
            too_large(64 * MIB, DeviceKind::Cpu).as_deref(),
            Some(
                "a worker needs 90.00 MiB of memory, more than 64.00 MiB; it would fit with \
                 training.micro_batch_size: 1 (60.00 MiB), or with training.activation_checkpointing: \
                 block and training.micro_batch_size: 2 (55.00 MiB)"
            )
        );
        assert_eq!(
            too_large(MIB, DeviceKind::Gpu).as_deref(),
            Some(
                "a worker needs 91.00 MiB of a GPU's memory, more than 1.00 MiB; no \
                 activation_checkpointing, micro_batch_size or quantization would make it fit, the base \
                 alone takes 50.00 MiB"
            )
        );
        let stored = serde_json::to_string(&requirements).unwrap();
        // The databases of older versions have these keys.
        assert!(stored.starts_with(r#"{"cpu":{"peak":94371840,"base":"#), "{stored}");
        assert!(stored.contains(r#""ways":[[{"settings":[],"peak":"#), "{stored}");
        assert_eq!(serde_json::from_str::<MemoryRequirements>(&stored).unwrap(), requirements);
    }
}
