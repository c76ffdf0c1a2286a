//! The queries or keys of a block after their projection: the norm and the rotary embedding, if the
//! block has them.

use candle_core::Tensor;
use lora_spec::NormModule;

use crate::ModelError;
use crate::norm::{Norm, NormActivations};
use crate::pass::Pass;
use crate::weight_source::WeightSource;

/// `rotate(norm(projected))`, without what the architecture does not have.
#[derive(Debug)]
pub(crate) struct RotaryHeads {
    pub(crate) norm: Option<Norm>,
    /// Index of the rotary embedding.
    rope: Option<usize>,
}

impl RotaryHeads {
    pub(crate) fn load(
        norm: Option<&NormModule>,
        rope: Option<usize>,
        weights: &impl WeightSource,
    ) -> Result<Self, ModelError> {
        Ok(Self { norm: norm.map(|norm| Norm::load(norm, weights)).transpose()?, rope })
    }

    /// Returns the queries or keys for the output of their projection, both
    /// `[tokens, heads * head_dim]`, and the activations of the norm. Without a norm, the elements
    /// of `projected` are rotated in place.
    pub(crate) fn forward(
        &self,
        projected: &Tensor,
        pass: &Pass,
    ) -> Result<(Tensor, Option<NormActivations>), ModelError> {
        let (y, saved) = match &self.norm {
            None => (projected.clone(), None),
            Some(norm) => {
                let (y, saved) = norm.forward(&norm.groups(projected)?)?;
                (y.reshape(projected.shape())?, Some(saved))
            }
        };
        pass.rotate(&y, self.rope)?;
        Ok((y, saved))
    }

    /// Returns the queries or keys of the forward pass, with the same bits.
    pub(crate) fn recompute(
        &self,
        saved: &Option<NormActivations>,
        projected: &Tensor,
        pass: &Pass,
    ) -> Result<Tensor, ModelError> {
        let (Some(norm), Some(saved)) = (&self.norm, saved) else { return Ok(projected.clone()) };
        let y = norm.recompute(saved, &norm.groups(projected)?)?.reshape(projected.shape())?;
        pass.rotate(&y, self.rope)?;
        Ok(y)
    }

    /// Converts the gradient of the queries or keys into that of the projection's output. `dy` is
    /// overwritten.
    pub(crate) fn backward(
        &self,
        saved: &Option<NormActivations>,
        projected: &Tensor,
        dy: Tensor,
        pass: &Pass,
    ) -> Result<Tensor, ModelError> {
        pass.rotate_backward(&dy, self.rope)?;
        let (Some(norm), Some(saved)) = (&self.norm, saved) else { return Ok(dy) };
        let dx = norm.backward(saved, &norm.groups(projected)?, &norm.groups(&dy)?, None)?;
        Ok(dx.reshape(projected.shape())?)
    }
}
