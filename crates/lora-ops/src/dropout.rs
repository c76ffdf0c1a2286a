//! Dropout whose mask is a pure function of (seed, step, row, module, position, feature).

use candle_core::{Result, Tensor};
use lora_spec::Philox;
use rayon::prelude::*;

use crate::cpu::{filled, read_f32};

/// The mask of one module in one step.
///
/// Counter of the generator: (step, dataset row, position, feature / 4); its key: seed and module path.
#[derive(Debug, Clone)]
pub struct Dropout {
    philox: Philox,
    step: u32,
    probability: f32,
    /// Dataset row and position of each token.
    tokens: std::sync::Arc<[(u32, u32)]>,
}

impl Dropout {
    /// Drops with `probability` in [0, 1); `tokens`: dataset row and position of each row of the tensors it is applied to.
    pub fn new(
        seed: u64,
        module: &str,
        step: u64,
        probability: f64,
        tokens: std::sync::Arc<[(u32, u32)]>,
    ) -> Self {
        let philox = Philox::new(seed, &format!("dropout {module}"));
        Self { philox, step: step as u32, probability: probability as f32, tokens }
    }

    /// `x` `[tokens, features]` with dropped elements zero and the others divided by `1 - probability`.
    ///
    /// The operation is linear in `x`: it is its own backward pass.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, features) = x.dims2()?;
        if tokens != self.tokens.len() {
            candle_core::bail!("a dropout mask of {} tokens met {tokens}", self.tokens.len());
        }
        let keep = 1.0 / (1.0 - self.probability);
        read_f32(x, |x| {
            filled((tokens, features), |y| {
                let rows = y.par_chunks_mut(features).zip(x.par_chunks(features)).zip(&*self.tokens);
                rows.for_each(|((y, x), &(row, position))| {
                    for (block, (y, x)) in y.chunks_mut(4).zip(x.chunks(4)).enumerate() {
                        let words = self.philox.words([self.step, row, position, block as u32]);
                        for ((y, x), word) in y.iter_mut().zip(x).zip(words) {
                            *y = if Philox::unit(word) < self.probability { 0.0 } else { x * keep };
                        }
                    }
                });
            })
        })?
    }
}
