//! Random inputs, generated on the device, and the sizes of the model.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use lora_ops::random::uniform;
use lora_spec::Philox;

pub(super) struct BenchInputs {
    device: Device,
    scale: usize,
}

impl BenchInputs {
    /// Creates inputs with all sizes divided by `scale`.
    pub(super) fn new(device: &Device, scale: usize) -> Self {
        Self { device: device.clone(), scale }
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn scale(&self) -> usize {
        self.scale
    }

    /// The scaled size: `size / scale`, rounded up to a multiple of 8.
    pub(super) fn size(&self, size: usize) -> usize {
        (size / self.scale).next_multiple_of(8).max(8)
    }

    pub(super) fn bf16(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(uniform(shape, 1.0, DType::BF16, &Philox::new(0, "microbench"), &self.device)?)
    }

    pub(super) fn f32(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(uniform(shape, 1.0, DType::F32, &Philox::new(0, "microbench"), &self.device)?)
    }
}

/// Hidden size of Llama-3.1-8B; the constants below are also those of this model.
pub(super) const HIDDEN: usize = 4096;
pub(super) const KEY_VALUE: usize = 1024;
pub(super) const INTERMEDIATE: usize = 14_336;
pub(super) const VOCAB: usize = 128_256;
/// Rank of the adapters, which is not scaled.
pub(super) const RANK: usize = 16;
/// Parameters of an adapter of that rank on every linear layer of the blocks.
pub(super) const ADAPTER: usize = 41_943_040;
/// Tokens of a micro-batch: one and two rows of 2048.
pub(super) const TOKENS: [usize; 2] = [2048, 4096];
