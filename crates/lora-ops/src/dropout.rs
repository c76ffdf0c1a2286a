//! Dropout whose mask is a pure function of (seed, step, row, module, position, feature), and
//! therefore the same on every device.

use candle_core::{Result, Tensor};
use lora_spec::Philox;

use crate::Ids;
use crate::backend::Backend;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// The mask of one module in one step.
///
/// The random number generator has the counter (step, dataset row, position, feature / 4) and a key
/// made of seed and module path.
#[derive(Debug, Clone)]
pub struct Dropout {
    philox: Philox,
    step: u32,
    probability: f32,
    tokens: Ids,
}

impl Dropout {
    /// Drops elements with `probability` in [0, 1). `tokens` alternates dataset row and position of
    /// each row of the tensors that the mask is applied to.
    pub fn new(seed: u64, module: &str, step: u64, probability: f64, tokens: Ids) -> Self {
        let philox = Philox::new(seed, &format!("dropout {module}"));
        Self { philox, step: step as u32, probability: probability as f32, tokens }
    }

    /// Returns `x` `[tokens, features]` with dropped elements set to zero and the others divided by
    /// `1 - probability`.
    ///
    /// The operation is linear in `x`, so it is also its own backward pass.
    #[tracing::instrument(level = "trace", name = "dropout", skip_all)]
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, features) = x.dims2()?;
        if features == 0 || self.tokens.len() != 2 * tokens {
            candle_core::bail!(
                "invalid dropout mask of {} tokens for {:?}",
                self.tokens.len() / 2,
                x.shape()
            );
        }
        match Backend::of_tensors(&[x])? {
            Backend::Cpu => cpu::apply(self, x),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => cuda::apply(&gpu, self, x),
        }
    }

    /// The factor of elements that are not dropped.
    fn keep_scale(&self) -> f32 {
        1.0 / (1.0 - self.probability)
    }
}
