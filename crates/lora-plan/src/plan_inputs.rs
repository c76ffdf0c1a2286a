//! The inputs of a job's memory, and the memory for each kind of device.

use lora_data::{Dataset, PAD_MULTIPLE};
use lora_spec::{
    ActivationCheckpointing, DeviceKind, FieldError, JobSpec, ModelConfig, QuantizationType,
    SafetensorsIndex, StoredWeight,
};

use crate::memory_requirements::{Alternative, DeviceRequirements};
use crate::{
    MemoryEstimate, MemoryRequirements, MicroBatchShape, ModelFootprint, PlanMemory, TrainingWorkload,
};

/// The inputs of a plan's memory, in addition to the job's settings.
pub(crate) struct PlanInputs<'a> {
    model: &'a ModelConfig,
    index: &'a SafetensorsIndex,
    /// Number of tokens of the longest training row.
    longest: usize,
    /// Number of training rows.
    rows: usize,
}

impl<'a> PlanInputs<'a> {
    pub(crate) fn new(model: &'a ModelConfig, index: &'a SafetensorsIndex, train: &Dataset) -> Self {
        Self { model, index, longest: train.report.longest, rows: train.rows.len() }
    }

    /// Returns the memory of a worker on each kind of device.
    pub(crate) fn memory(&self, job: &JobSpec) -> Result<PlanMemory, FieldError> {
        Ok(PlanMemory {
            cpu: self.estimate(job, DeviceKind::Cpu)?,
            gpu: self.estimate(job, DeviceKind::Gpu)?,
        })
    }

    /// Returns the shape of the largest micro-batch, and the number of micro-batches that a worker
    /// computes in a step.
    pub(crate) fn shape(&self, job: &JobSpec) -> MicroBatchShape {
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
        let footprint =
            ModelFootprint { model: self.model, index: Some(self.index), format: job.model.format(), device };
        let shape = self.shape(job);
        let modules = job.adapter.target_modules.resolve(self.model)?;
        Ok(footprint.memory(&TrainingWorkload {
            modules: &modules,
            adapter: &job.adapter,
            shape,
            checkpointing: training.activation_checkpointing,
            optim: training.optim,
            keeps_best: training.load_best_model_at_end,
        }))
    }

    /// Returns the memory that a worker needs with the settings of `job` and with alternatives.
    pub(crate) fn requirements(&self, job: &JobSpec) -> Result<MemoryRequirements, FieldError> {
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

/// Returns keys and values of the settings of `changed` that differ from `job`.
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
