//! What a worker of a job needs in memory, and which settings would make it need less.

use lora_spec::{
    ActivationCheckpointing, Checkpoint, FieldError, Held, JobSpec, Memory, MicroBatchShape, ModelConfig,
    QuantizationType, StoredWeight, Training,
};
use serde::Serialize;

use crate::batch::PAD_TO;

/// Peak of each of the fewest workers that a job can have.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PlanMemory {
    /// Of a worker on a CPU.
    pub cpu: Memory,
    /// Of a GPU's memory, CUDA's own not counted.
    pub gpu: Memory,
}

/// Settings with which a worker would need less.
#[derive(Debug, Clone, Serialize)]
pub struct Remedy {
    /// Keys and values.
    pub settings: Vec<(&'static str, String)>,
    /// Peak with them, in bytes.
    pub peak: u64,
}

/// What memory depends on beside the job's settings.
pub(super) struct Shapes {
    pub(super) model: ModelConfig,
    pub(super) checkpoint: Checkpoint,
    /// Tokens of the longest training row.
    pub(super) longest: usize,
    /// Training rows.
    pub(super) rows: usize,
}

impl Shapes {
    pub(super) fn memory(&self, job: &JobSpec) -> Result<PlanMemory, FieldError> {
        Ok(PlanMemory { cpu: self.of(job, false)?, gpu: self.of(job, true)? })
    }

    fn of(&self, job: &JobSpec, gpu: bool) -> Result<Memory, FieldError> {
        let training = &job.training;
        let held =
            Held { model: &self.model, checkpoint: Some(&self.checkpoint), format: job.model.format(), gpu };
        let micro_batches = self.rows.min(training.global_batch_size).div_ceil(training.micro_batch_size);
        let shape = MicroBatchShape {
            rows: training.micro_batch_size.min(self.rows),
            // The last token is only predicted.
            positions: self.longest.saturating_sub(1).next_multiple_of(PAD_TO),
            count: micro_batches.div_ceil(job.workers.min),
        };
        let modules = job.adapter.target_modules.resolve(&self.model)?;
        Ok(held.memory(&Training {
            modules: &modules,
            r: job.adapter.r,
            init: job.adapter.init_lora_weights,
            shape,
            checkpointing: training.activation_checkpointing,
            optim: training.optim,
        }))
    }

    /// Up to three changes of settings, the smallest ones first, with which a worker needs at most `limit` bytes.
    pub(super) fn remedies(&self, job: &JobSpec, limit: u64, gpu: bool) -> Result<Vec<Remedy>, FieldError> {
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
        let mut found = Vec::new();
        for (checkpointing, quantization) in
            less_kept.flat_map(|it| quantizations.iter().map(move |quantization| (it, *quantization)))
        {
            // Of the sizes that fit the largest.
            for &size in &sizes {
                let mut changed = job.clone();
                changed.training.activation_checkpointing = checkpointing;
                changed.training.micro_batch_size = size;
                changed.model.quantization = quantization;
                let peak = self.of(&changed, gpu)?.peak;
                if peak <= limit {
                    found.push(Remedy { settings: differences(job, &changed), peak });
                    break;
                }
            }
        }
        found.sort_by_key(|remedy| remedy.settings.len());
        found.truncate(3);
        Ok(found)
    }

    fn is_dense(&self) -> bool {
        let modules = self.model.linear_modules();
        modules.iter().all(|module| matches!(self.checkpoint.weight(module), Ok(StoredWeight::Dense)))
    }
}

fn differences(job: &JobSpec, changed: &JobSpec) -> Vec<(&'static str, String)> {
    let json = |job: &JobSpec| serde_json::to_value(job).unwrap_or_default();
    let (before, after) = (json(job), json(changed));
    ["model.quantization", "training.activation_checkpointing", "training.micro_batch_size"]
        .into_iter()
        .filter_map(|key| {
            let pointer = format!("/{}", key.replace('.', "/"));
            let (before, after) = (before.pointer(&pointer)?, after.pointer(&pointer)?);
            let text = after.as_str().map_or_else(|| after.to_string(), str::to_owned);
            (before != after).then_some((key, text))
        })
        .collect()
}
