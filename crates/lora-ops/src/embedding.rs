//! Token embedding.

use candle_core::{Result, Tensor};

use crate::Ids;
use crate::backend::Backend;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// Returns the rows `tokens` of `weight` `[vocab, features]` (f32 or bf16) as `[tokens, features]`:
/// f32 on the CPU, and of the weight's type on a GPU.
#[tracing::instrument(level = "trace", name = "embedding", skip_all)]
pub fn forward(weight: &Tensor, tokens: &Ids) -> Result<Tensor> {
    let (vocab, features) = weight.dims2()?;
    if features == 0 {
        candle_core::bail!("invalid embedding {:?}: it has no features", weight.shape());
    }
    if let Some(token) = tokens.host().iter().find(|t| **t as usize >= vocab) {
        candle_core::bail!("token {token} is outside the vocabulary of {vocab}");
    }
    match Backend::of_tensors(&[weight])? {
        Backend::Cpu => cpu::forward(weight, tokens.host()),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::forward(&gpu, weight, tokens),
    }
}
