//! The inputs of a job's memory, and the memory for each kind of device.

use std::collections::BTreeSet;

use lora_data::{Dataset, PAD_MULTIPLE};
use lora_spec::{DeviceKind, FieldError, JobSpec, ModelConfig, SafetensorsIndex, StoredWeight};

use crate::{MemoryEstimate, MicroBatchShape, ModelFootprint, PlanMemory, TrainingWorkload};

/// The inputs of a plan's memory, in addition to the job's settings.
pub(crate) struct PlanInputs<'a> {
    model: &'a ModelConfig,
    index: &'a SafetensorsIndex,
    /// Number of tokens of the longest training row.
    longest: usize,
    /// Number of training rows in an epoch.
    rows: usize,
    /// Number of tokens of all training rows.
    tokens: u64,
}

impl<'a> PlanInputs<'a> {
    pub(crate) fn new(model: &'a ModelConfig, index: &'a SafetensorsIndex, train: &Dataset) -> Self {
        Self {
            model,
            index,
            longest: train.report.longest,
            rows: train.epoch_rows(),
            tokens: train.report.tokens,
        }
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
        // The last token of a row is only a target.
        let unpacked = self.longest.saturating_sub(1);
        let packed = usize::try_from(self.tokens).unwrap_or(usize::MAX).min(job.data.max_length);
        let positions = if job.data.packing { packed.max(unpacked) } else { unpacked };
        MicroBatchShape {
            rows: training.micro_batch_size.min(self.rows),
            positions: positions.next_multiple_of(PAD_MULTIPLE),
            count: micro_batches.div_ceil(job.workers.min),
        }
    }

    /// Returns the memory of a worker on a device of this kind.
    pub(crate) fn estimate(&self, job: &JobSpec, device: DeviceKind) -> Result<MemoryEstimate, FieldError> {
        let training = &job.training;
        let mut format = job.model.format();
        if device == DeviceKind::Gpu {
            format.dtype = self.index.gpu_dtype(self.model, format.dtype);
        }
        let footprint = ModelFootprint { model: self.model, index: Some(self.index), format, device };
        let shape = self.shape(job);
        let modules = job.adapter.target_modules.resolve(self.model)?;
        let mut memory = footprint.memory(&TrainingWorkload {
            modules: &modules,
            adapter: &job.adapter,
            shape,
            checkpointing: training.activation_checkpointing,
            optim: training.optim,
            keeps_best: training.load_best_model_at_end,
        });
        if job.data.packing {
            let packed = self.packing_bytes(shape);
            memory.activations += packed;
            memory.peak += packed;
        }
        Ok(memory)
    }

    /// Returns the bytes that packed rows take in addition: the cosines and sines of each token,
    /// and the first key that it sees, f32 and u32.
    fn packing_bytes(&self, shape: MicroBatchShape) -> u64 {
        let windows = self.model.blocks().filter_map(|block| block.attn.sliding_window);
        let windows: BTreeSet<usize> = windows.collect();
        let of_ropes: usize = self.model.ropes.iter().map(|rope| rope.rotary_dim).sum();
        let tokens = shape.rows * shape.positions;
        (4 * tokens * (of_ropes + 1 + windows.len())) as u64
    }

    /// Whether no weight of the blocks is stored quantized.
    pub(crate) fn is_dense(&self) -> bool {
        let modules = self.model.linear_modules();
        modules.iter().all(|module| matches!(self.index.weight(module), Ok(StoredWeight::Dense)))
    }
}

#[cfg(test)]
mod tests {
    use lora_spec::BaseDtype;

    use super::*;

    /// On a GPU all dense matrices have one type, so one f32 tensor widens a bf16 base.
    #[test]
    fn a_bf16_base_with_f32_norms_is_planned_as_f32_on_a_gpu() {
        let dir = lora_test_kit::golden("models/llama-bf16").as_path().into();
        let model = ModelConfig::read(&dir).unwrap();
        let mut index = SafetensorsIndex::open(&dir).unwrap();
        let base = |index: &SafetensorsIndex, dtype, device| {
            let mut job = JobSpec::default();
            job.model.dtype = dtype;
            PlanInputs { model: &model, index, longest: 9, rows: 1, tokens: 9 }
                .estimate(&job, device)
                .unwrap()
                .base
        };
        let bf16 = base(&index, BaseDtype::Bf16, DeviceKind::Gpu);
        assert_eq!(base(&index, BaseDtype::Auto, DeviceKind::Gpu), bf16);
        index.tensors.get_mut("model.norm.weight").unwrap().dtype = "F32".to_owned();
        let f32 = base(&index, BaseDtype::F32, DeviceKind::Gpu);
        assert_eq!(base(&index, BaseDtype::Auto, DeviceKind::Gpu), f32);
        assert_eq!(base(&index, BaseDtype::Auto, DeviceKind::Cpu), bf16);
        assert!(f32 > bf16);
    }
}
