//! RMSNorm with a frozen weight.

use candle_core::Tensor;
use lora_ops::rms_norm::{self, RmsNormActivations};
use lora_spec::NormModule;

use crate::ModelError;
use crate::weight_source::WeightSource;

/// An RMSNorm.
#[derive(Debug)]
pub(crate) struct Norm {
    /// Full name, such as `model.layers.0.input_layernorm`.
    pub(crate) name: String,
    /// `[features]`, f32.
    pub(crate) weight: Tensor,
    eps: f64,
}

impl Norm {
    pub(crate) fn load(module: &NormModule, weights: &impl WeightSource) -> Result<Self, ModelError> {
        let weight = weights.vector(&format!("{}.weight", module.name))?;
        Ok(Self { name: module.name.clone(), weight, eps: module.eps })
    }

    /// Returns the size of the weight in bytes.
    pub(crate) fn bytes(&self) -> usize {
        4 * self.weight.elem_count()
    }

    /// Normalizes `x` `[tokens, features]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<(Tensor, RmsNormActivations), ModelError> {
        Ok(rms_norm::forward(x, &self.weight, self.eps)?)
    }

    /// Adds `residual` to `x`, both `[tokens, features]`, in place, and returns the normalized sum.
    pub(crate) fn add_forward(
        &self,
        x: &Tensor,
        residual: &Tensor,
    ) -> Result<(Tensor, RmsNormActivations), ModelError> {
        Ok(rms_norm::add_forward(x, residual, &self.weight, self.eps)?)
    }

    /// Recomputes the output of the forward pass over `x`.
    pub(crate) fn recompute(&self, saved: &RmsNormActivations, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(rms_norm::recompute(saved, x, &self.weight)?)
    }

    /// Returns the gradient of `x` from that of the output, plus `residual`: the gradient that
    /// reaches `x` on other paths than through the norm.
    pub(crate) fn backward(
        &self,
        saved: &RmsNormActivations,
        x: &Tensor,
        dy: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<Tensor, ModelError> {
        Ok(rms_norm::backward(saved, x, &self.weight, dy, residual)?)
    }
}
