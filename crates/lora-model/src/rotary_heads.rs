//! The queries or keys of a block: their projection, and the norm and the rotary embedding if the
//! block has them.

use candle_core::Tensor;
use lora_ops::rms_norm::RmsNormActivations;
use lora_spec::{LinearModule, NormModule, Rope};

use crate::ModelError;
use crate::norm::Norm;
use crate::pass::Pass;
use crate::projection::{Linear, Projected};
use crate::weight_source::WeightSource;

/// `rotate(norm(proj(x)))`.
#[derive(Debug)]
pub(crate) struct RotaryHeads {
    pub(crate) proj: Linear,
    pub(crate) norm: Option<Norm>,
    pub(crate) rope: Option<Rope>,
}

/// Intermediate results of the forward pass that the backward pass reads.
pub(crate) struct RotaryActivations {
    /// The output of the projection. Without a norm, its elements are rotated in place.
    pub(crate) projected: Projected,
    norm: Option<RmsNormActivations>,
}

impl RotaryHeads {
    pub(crate) fn load(
        proj: &LinearModule,
        norm: Option<&NormModule>,
        rope: Option<Rope>,
        weights: &impl WeightSource,
    ) -> Result<Self, ModelError> {
        let norm = norm.map(|norm| Norm::load(norm, weights)).transpose()?;
        Ok(Self { proj: Linear::load(proj, weights)?, norm, rope })
    }

    /// Returns the queries or keys `[tokens, heads * head_dim]` for `x` `[tokens, hidden]`, and the
    /// activations.
    pub(crate) fn forward(&self, x: &Tensor, pass: &Pass) -> Result<(Tensor, RotaryActivations), ModelError> {
        let projected = pass.projection(&self.proj).forward(x)?;
        let (y, norm) = match &self.norm {
            None => (projected.y.clone(), None),
            Some(norm) => {
                let (y, saved) = norm.forward(&norm.groups(&projected.y)?)?;
                (y.reshape(projected.y.shape())?, Some(saved))
            }
        };
        pass.rotate(&y, self.rope)?;
        Ok((y, RotaryActivations { projected, norm }))
    }

    /// Returns the queries or keys of the forward pass, with the same bits.
    pub(crate) fn recompute(&self, saved: &RotaryActivations, pass: &Pass) -> Result<Tensor, ModelError> {
        let projected = &saved.projected.y;
        let (Some(norm), Some(activations)) = (&self.norm, &saved.norm) else { return Ok(projected.clone()) };
        let y = norm.recompute(activations, &norm.groups(projected)?)?.reshape(projected.shape())?;
        pass.rotate(&y, self.rope)?;
        Ok(y)
    }

    /// Converts the gradient of the queries or keys into that of the projection's output. `dy` is
    /// overwritten.
    pub(crate) fn backward(
        &self,
        saved: &RotaryActivations,
        dy: Tensor,
        pass: &Pass,
    ) -> Result<Tensor, ModelError> {
        pass.rotate_backward(&dy, self.rope)?;
        let (Some(norm), Some(activations)) = (&self.norm, &saved.norm) else { return Ok(dy) };
        let projected = &saved.projected.y;
        let dx = norm.backward(activations, &norm.groups(projected)?, &norm.groups(&dy)?, None)?;
        Ok(dx.reshape(projected.shape())?)
    }
}
