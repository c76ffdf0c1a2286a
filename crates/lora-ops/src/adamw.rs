//! AdamW (arXiv 1711.05101), equal to `torch.optim.AdamW`: decay first, bias correction as torch applies it.

use rayon::prelude::*;

use crate::cpu::GRAIN;
use crate::simd::vectorize;

/// Settings of one step.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// First decay rate.
    pub beta1: f64,
    /// Second decay rate.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Parameters and moments, f32, equally long.
#[derive(Debug)]
pub struct State<'a> {
    /// Parameters.
    pub params: &'a mut [f32],
    /// First moments.
    pub m: &'a mut [f32],
    /// Second moments.
    pub v: &'a mut [f32],
}

impl AdamW {
    /// Step number `t` (from 1) with `gradient * factor`; `factor` carries clipping.
    ///
    /// # Panics
    /// If the slices differ in length.
    #[tracing::instrument(level = "trace", name = "adamw", skip_all)]
    pub fn step(&self, t: u64, state: State, gradient: &[f32], factor: f32) {
        let State { params, m, v } = state;
        let n = params.len();
        assert!(m.len() == n && v.len() == n && gradient.len() == n, "state and gradient differ in length");
        let power = t.min(i32::MAX as u64) as i32;
        let correction1 = 1.0 - self.beta1.powi(power);
        let correction2 = (1.0 - self.beta2.powi(power)).sqrt();
        let step_size = (self.lr / correction1) as f32;
        let correction2 = correction2 as f32;
        let decay = (1.0 - self.lr * self.weight_decay) as f32;
        let (rest1, beta2, rest2) = ((1.0 - self.beta1) as f32, self.beta2 as f32, (1.0 - self.beta2) as f32);
        let eps = self.eps as f32;
        let moments = m.par_chunks_mut(GRAIN).zip(v.par_chunks_mut(GRAIN));
        let chunks = params.par_chunks_mut(GRAIN).zip(moments).zip(gradient.par_chunks(GRAIN));
        chunks.for_each(|((params, (m, v)), gradient)| {
            vectorize(|| {
                for (((p, m), v), g) in params.iter_mut().zip(m).zip(v).zip(gradient) {
                    let g = g * factor;
                    *m += rest1 * (g - *m);
                    *v = *v * beta2 + rest2 * (g * g);
                    let denominator = v.sqrt() / correction2 + eps;
                    *p = *p * decay - step_size * (*m / denominator);
                }
            });
        });
    }
}

/// The factor of `torch.nn.utils.clip_grad_norm_`: `min(1, max_norm / (norm + 1e-6))`; 1 where `max_norm` is 0.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) as f32 }
}
