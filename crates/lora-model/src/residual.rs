//! The connections of attention and MLP to the residual stream, `x + m out_norm(f(in_norm(x)))`:
//! the norms, where the architecture has them, and the multiplier `m`.

use candle_core::Tensor;
use lora_ops::add_assign;
use lora_ops::pointwise::scaled;
use lora_spec::NormModule;

use crate::ModelError;
use crate::norm::{Norm, NormActivations};
use crate::weight_source::WeightSource;

/// The input of attention or MLP: `in_norm(x)`.
#[derive(Debug)]
pub(crate) struct ResidualInput {
    pub(crate) norm: Option<Norm>,
}

/// What the backward pass of the input's norm needs in addition to `x`.
pub(crate) struct InputActivations(Option<NormActivations>);

/// The output of attention or MLP, which is added to the residual stream: `m out_norm(y)`.
#[derive(Debug)]
pub(crate) struct ResidualOutput {
    pub(crate) norm: Option<Norm>,
    multiplier: f64,
}

/// What the backward pass of the output's norm needs: the output before the norm.
#[derive(Default)]
pub(crate) struct OutputActivations(Option<(Tensor, NormActivations)>);

fn load(norm: Option<&NormModule>, weights: &impl WeightSource) -> Result<Option<Norm>, ModelError> {
    norm.map(|norm| Norm::load(norm, weights)).transpose()
}

impl ResidualInput {
    pub(crate) fn load(norm: Option<&NormModule>, weights: &impl WeightSource) -> Result<Self, ModelError> {
        Ok(Self { norm: load(norm, weights)? })
    }

    /// Returns the input for `x`, both `[tokens, hidden]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<(Tensor, InputActivations), ModelError> {
        let Some(norm) = &self.norm else { return Ok((x.clone(), InputActivations(None))) };
        let (normed, saved) = norm.forward(x)?;
        Ok((normed, InputActivations(Some(saved))))
    }

    /// Adds `residual` to `x`, both `[tokens, hidden]`, in place, and returns the input for the
    /// sum.
    pub(crate) fn add_forward(
        &self,
        x: &Tensor,
        residual: &Tensor,
    ) -> Result<(Tensor, InputActivations), ModelError> {
        let Some(norm) = &self.norm else {
            add_assign(x, residual)?;
            return Ok((x.clone(), InputActivations(None)));
        };
        let (normed, saved) = norm.add_forward(x, residual)?;
        Ok((normed, InputActivations(Some(saved))))
    }

    /// Recomputes the input for `x`.
    pub(crate) fn recompute(&self, saved: &InputActivations, x: &Tensor) -> Result<Tensor, ModelError> {
        match (&self.norm, &saved.0) {
            (Some(norm), Some(saved)) => norm.recompute(saved, x),
            _ => Ok(x.clone()),
        }
    }

    /// Returns the gradient of `x` from that of the input, plus `residual`: the gradient that
    /// reaches `x` through the residual stream. `d_input` is overwritten.
    pub(crate) fn backward(
        &self,
        saved: &InputActivations,
        x: &Tensor,
        d_input: Tensor,
        residual: &Tensor,
    ) -> Result<Tensor, ModelError> {
        match (&self.norm, &saved.0) {
            (Some(norm), Some(saved)) => norm.backward(saved, x, &d_input, Some(residual)),
            _ => {
                add_assign(&d_input, residual)?;
                Ok(d_input)
            }
        }
    }
}

impl ResidualOutput {
    pub(crate) fn load(
        norm: Option<&NormModule>,
        multiplier: f64,
        weights: &impl WeightSource,
    ) -> Result<Self, ModelError> {
        Ok(Self { norm: load(norm, weights)?, multiplier })
    }

    /// Returns what the output `y` `[tokens, hidden]` adds to the residual stream.
    pub(crate) fn forward(&self, y: Tensor) -> Result<(Tensor, OutputActivations), ModelError> {
        let (y, saved) = match &self.norm {
            None => (y, None),
            Some(norm) => {
                let (normed, saved) = norm.forward(&y)?;
                (normed, Some((y, saved)))
            }
        };
        Ok((self.multiplied(y)?, OutputActivations(saved)))
    }

    /// Returns the gradient of `y` from `dh`, that of the residual stream.
    pub(crate) fn backward(&self, saved: &OutputActivations, dh: &Tensor) -> Result<Tensor, ModelError> {
        let d_normed = self.multiplied(dh.clone())?;
        match (&self.norm, &saved.0) {
            (Some(norm), Some((y, saved))) => norm.backward(saved, y, &d_normed, None),
            _ => Ok(d_normed),
        }
    }

    fn multiplied(&self, x: Tensor) -> Result<Tensor, ModelError> {
        if self.multiplier == 1.0 { Ok(x) } else { Ok(scaled(&x, self.multiplier)?) }
    }
}
