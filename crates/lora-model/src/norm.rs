//! RMSNorm with a frozen weight, of the residual stream, or of queries, keys and values.

use candle_core::Tensor;
use lora_ops::rms_norm::{self, RmsNormActivations};
use lora_ops::transfer::{from_vec, to_vec};
use lora_spec::NormModule;

use crate::ModelError;
use crate::weight_source::WeightSource;

/// An RMSNorm.
#[derive(Debug)]
pub(crate) struct Norm {
    /// Full name, such as `model.layers.0.input_layernorm`.
    pub(crate) name: String,
    /// The weight in the base's files, `[features]`, f32, if there is one.
    pub(crate) stored: Option<Tensor>,
    /// The factor of each feature, `[features]`, f32.
    weight: Tensor,
    eps: f64,
}

impl Norm {
    pub(crate) fn load(module: &NormModule, weights: &impl WeightSource) -> Result<Self, ModelError> {
        if !module.has_weight {
            let factors = vec![module.scale as f32; module.features];
            let weight = from_vec(factors, module.features, weights.device())?;
            return Ok(Self { name: module.name.clone(), stored: None, weight, eps: module.eps });
        }
        let stored = weights.vector(&format!("{}.weight", module.name))?;
        let weight = match module.has_own_factors() {
            false => stored.clone(),
            true => {
                let on_cpu = to_vec::<f32>(&stored)?.into_iter();
                let factors = on_cpu.map(|w| ((f64::from(w) + module.offset) * module.scale) as f32);
                from_vec(factors.collect(), stored.shape(), stored.device())?
            }
        };
        Ok(Self { name: module.name.clone(), stored: Some(stored), weight, eps: module.eps })
    }

    /// Returns the size of the weights in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let is_copied = self.stored.as_ref().is_some_and(|stored| stored.id() != self.weight.id());
        4 * if is_copied { 2 } else { 1 } * self.weight.elem_count()
    }

    /// Normalizes `x` `[tokens, features]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<(Tensor, RmsNormActivations), ModelError> {
        Ok(rms_norm::forward(x, &self.weight, self.eps)?)
    }

    /// Views `x` `[tokens, groups * features]` as `[tokens * groups, features]`: each group of
    /// features, such as a head, is normalized on its own.
    pub(crate) fn groups(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(x.reshape(((), self.weight.elem_count()))?)
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
