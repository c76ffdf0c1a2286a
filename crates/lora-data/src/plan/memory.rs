//! What a worker of a job needs in memory, and which settings would make it need less.

use std::path::Path;

use lora_spec::{
    ActivationCheckpointing, FieldError, JobSpec, MemoryEstimate, MicroBatchShape, ModelConfig,
    ModelFootprint, QuantizationType, SafetensorsIndex, StoredWeight, TrainingWorkload, format_bytes,
};
use serde::{Deserialize, Serialize};

use super::PlanError;
use crate::Dataset;
use crate::batch::PAD_TO;

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
pub struct Needs {
    cpu: Need,
    gpu: Need,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Need {
    peak: u64,
    base: u64,
    /// Ways to need less, those that compute least first; of each its micro-batches, the largest first.
    ways: Vec<Vec<Remedy>>,
}

/// Settings with which a worker would need less.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remedy {
    /// Keys and values.
    settings: Vec<(String, String)>,
    /// Peak with them, in bytes.
    peak: u64,
}

impl Needs {
    /// What a worker needs of `job` over the base in the directory `base`, with these training rows. Reads no weights.
    pub fn new(job: &JobSpec, base: &Path, train: &Dataset) -> Result<Self, PlanError> {
        let model = ModelConfig::read(base)?;
        let index = SafetensorsIndex::open(base)?;
        job.adapter.check_base(&model, &index)?;
        Ok(Shapes { model, index, longest: train.report.longest, rows: train.rows.len() }.needs(job)?)
    }

    /// Bytes that a worker needs, of a GPU or (`gpu` false) of its machine.
    pub fn peak(&self, gpu: bool) -> u64 {
        self.of(gpu).peak
    }

    /// Why a worker with `limit` bytes cannot have the job, and up to three changes of settings with which it could, the smallest
    /// ones first; `None`: it can.
    pub fn too_large(&self, limit: u64, gpu: bool) -> Option<String> {
        let Need { peak, base, ways } = self.of(gpu);
        if *peak <= limit {
            return None;
        }
        // Of the micro-batches that fit the largest.
        let mut remedies: Vec<&Remedy> =
            ways.iter().filter_map(|sizes| sizes.iter().find(|remedy| remedy.peak <= limit)).collect();
        remedies.sort_by_key(|remedy| remedy.settings.len());
        remedies.truncate(3);
        let settings = remedies.iter().map(|remedy| {
            let settings = remedy.settings.iter().map(|(key, value)| format!("{key}: {value}"));
            format!("{} ({})", settings.collect::<Vec<_>>().join(" and "), format_bytes(remedy.peak))
        });
        let would = match remedies.is_empty() {
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

    fn of(&self, gpu: bool) -> &Need {
        if gpu { &self.gpu } else { &self.cpu }
    }
}

/// What memory depends on beside the job's settings.
pub(super) struct Shapes {
    pub(super) model: ModelConfig,
    pub(super) index: SafetensorsIndex,
    /// Tokens of the longest training row.
    pub(super) longest: usize,
    /// Training rows.
    pub(super) rows: usize,
}

impl Shapes {
    pub(super) fn memory(&self, job: &JobSpec) -> Result<PlanMemory, FieldError> {
        Ok(PlanMemory { cpu: self.of(job, false)?, gpu: self.of(job, true)? })
    }

    /// The largest micro-batch, and how many a worker computes in a step.
    pub(super) fn shape(&self, job: &JobSpec) -> MicroBatchShape {
        let training = &job.training;
        let micro_batches = self.rows.min(training.global_batch_size).div_ceil(training.micro_batch_size);
        MicroBatchShape {
            rows: training.micro_batch_size.min(self.rows),
            // The last token is only predicted.
            positions: self.longest.saturating_sub(1).next_multiple_of(PAD_TO),
            count: micro_batches.div_ceil(job.workers.min),
        }
    }

    fn of(&self, job: &JobSpec, gpu: bool) -> Result<MemoryEstimate, FieldError> {
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

    pub(super) fn needs(&self, job: &JobSpec) -> Result<Needs, FieldError> {
        Ok(Needs { cpu: self.need(job, false)?, gpu: self.need(job, true)? })
    }

    fn need(&self, job: &JobSpec, gpu: bool) -> Result<Need, FieldError> {
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
        let mut ways = Vec::new();
        for (checkpointing, quantization) in
            less_kept.flat_map(|it| quantizations.iter().map(move |quantization| (it, *quantization)))
        {
            let mut way = Vec::new();
            for &size in &sizes {
                let mut changed = job.clone();
                changed.training.activation_checkpointing = checkpointing;
                changed.training.micro_batch_size = size;
                changed.model.quantization = quantization;
                let peak = self.of(&changed, gpu)?.peak;
                way.push(Remedy { settings: differences(job, &changed), peak });
            }
            ways.push(way);
        }
        let MemoryEstimate { peak, base, .. } = self.of(job, gpu)?;
        Ok(Need { peak, base, ways })
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

    fn remedy(settings: &[(&str, &str)], peak: u64) -> Remedy {
        let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Remedy { settings: settings.collect(), peak }
    }

    #[test]
    fn a_worker_that_is_too_small_is_told_what_would_fit() {
        const MIB: u64 = 1 << 20;
        let (size, block) = ("training.micro_batch_size", ("training.activation_checkpointing", "block"));
        let ways = vec![
            vec![remedy(&[], 90 * MIB), remedy(&[(size, "2")], 70 * MIB), remedy(&[(size, "1")], 60 * MIB)],
            vec![remedy(&[block], 65 * MIB), remedy(&[block, (size, "2")], 55 * MIB)],
        ];
        let cpu = Need { peak: 90 * MIB, base: 50 * MIB, ways };
        let needs = Needs { gpu: Need { peak: 91 * MIB, ..cpu.clone() }, cpu };
        assert_eq!(needs.too_large(90 * MIB, false), None);
        assert_eq!(
            needs.too_large(64 * MIB, false).as_deref(),
            Some(
                "a worker needs 90.00 MiB of memory, more than 64.00 MiB; it would fit with \
                 training.micro_batch_size: 1 (60.00 MiB), or with training.activation_checkpointing: block and \
                 training.micro_batch_size: 2 (55.00 MiB)"
            )
        );
        assert_eq!(
            needs.too_large(MIB, true).as_deref(),
            Some(
                "a worker needs 91.00 MiB of a GPU's memory, more than 1.00 MiB; no activation_checkpointing, \
                 micro_batch_size or quantization would make it fit, the base alone takes 50.00 MiB"
            )
        );
        let stored = serde_json::to_string(&needs).unwrap();
        assert_eq!(serde_json::from_str::<Needs>(&stored).unwrap(), needs);
    }
}
