//! The last part of a step: the update of the parameters.

use candle_core::Tensor;
use lora_ops::adamw::clip_factor;

use super::Engine;
use crate::error::TrainError;

/// A step whose gradients are reduced.
pub struct ReducedGradients<'a> {
    pub(super) engine: &'a mut Engine,
    /// The mean gradient, f32, in the adapter's layout.
    pub(super) gradient: Tensor,
    pub(super) norm: f64,
}

impl ReducedGradients<'_> {
    /// Returns the 2-norm of the mean gradient, before it is clipped.
    pub fn norm(&self) -> f64 {
        self.norm
    }

    /// Clips the gradient to the norm `max_grad_norm` (0: not clipped) and updates the parameters
    /// with the learning rate `lr`.
    pub fn optim_step(self, lr: f64, max_grad_norm: f64) -> Result<(), TrainError> {
        let Self { engine, gradient, norm } = self;
        let factor = clip_factor(norm, max_grad_norm);
        engine.optimizer.step(lr, engine.adapter.params(), &gradient, factor)?;
        Ok(engine.adapter.refresh()?)
    }
}
