//! The MLP of a block: `down_proj(activation(gate_proj(x)) * up_proj(x))`.

use candle_core::Tensor;
use lora_ops::glu;
use lora_ops::lora::LoraActivations;
use lora_spec::{ActivationFunction, MlpConfig};

use crate::pass::Pass;
use crate::projection::{Linear, Projected, Projection};
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// A gated MLP.
#[derive(Debug)]
pub(crate) struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    activation: ActivationFunction,
}

/// Intermediate results of the forward pass that the backward pass reads.
pub(crate) struct MlpActivations {
    gate: Projected,
    up: Projected,
    down: Option<LoraActivations>,
}

impl Mlp {
    pub(crate) fn load(config: &MlpConfig, weights: &impl WeightSource) -> Result<Self, ModelError> {
        Ok(Self {
            gate_proj: Linear::load(&config.gate_proj, weights)?,
            up_proj: Linear::load(&config.up_proj, weights)?,
            down_proj: Linear::load(&config.down_proj, weights)?,
            activation: config.activation,
        })
    }

    /// Returns the linear modules in the order of computation.
    pub(crate) fn linears(&self) -> [&Linear; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj]
    }

    /// Returns the output for `x`, both `[tokens, hidden]`, and the activations.
    pub(crate) fn forward(&self, x: Tensor, pass: &Pass) -> Result<(Tensor, MlpActivations), ModelError> {
        let (gate, up) = self.gate_and_up(x, pass)?;
        let down = pass.projection(&self.down_proj).forward(&self.gated(&gate, &up)?)?;
        Ok((down.y, MlpActivations { gate, up, down: down.lora }))
    }

    /// Recomputes the activations of the forward pass over `x`, with the same bits. The product
    /// with the frozen weight of `down_proj` is not recomputed, because the backward pass does not
    /// need it.
    pub(crate) fn recompute(&self, x: Tensor, pass: &Pass) -> Result<MlpActivations, ModelError> {
        let (gate, up) = self.gate_and_up(x, pass)?;
        let down = pass.projection(&self.down_proj).recompute(|| self.gated(&gate, &up))?;
        Ok(MlpActivations { gate, up, down })
    }

    fn gate_and_up(&self, x: Tensor, pass: &Pass) -> Result<(Projected, Projected), ModelError> {
        Ok((pass.projection(&self.gate_proj).forward(&x)?, pass.projection(&self.up_proj).forward(&x)?))
    }

    /// Returns the input of `down_proj`.
    fn gated(&self, gate: &Projected, up: &Projected) -> Result<Tensor, ModelError> {
        Ok(glu::forward(&gate.y, &up.y, self.activation)?)
    }

    /// The backward pass: adds the gradients of the adapters to `grads` and returns the gradient of
    /// the input if `need_dx` is set. `x` returns the input of the forward pass. The pass ends at
    /// the lowest projection whose gradient is needed.
    pub(crate) fn backward(
        &self,
        saved: &MlpActivations,
        x: impl FnOnce() -> Result<Tensor, ModelError>,
        dy: &Tensor,
        pass: &Pass,
        grads: &Gradients,
        need_dx: bool,
    ) -> Result<Option<Tensor>, ModelError> {
        let MlpActivations { gate, up, down } = saved;
        let [gate_proj, up_proj, down_proj] = self.linears().map(|linear| pass.projection(linear));
        let need_d_gated = need_dx || gate_proj.is_trained() || up_proj.is_trained();
        let d_gated = Projection::backward(
            &[down_proj.output_grad(down, dy)],
            || self.gated(gate, up),
            grads,
            need_d_gated,
        )?;
        let Some(d_gated) = d_gated else { return Ok(None) };
        let (d_gate, d_up) = glu::backward(&gate.y, &up.y, &d_gated, self.activation)?;
        drop(d_gated);
        let outputs = [gate_proj.output_grad(&gate.lora, &d_gate), up_proj.output_grad(&up.lora, &d_up)];
        Projection::backward(&outputs, x, grads, need_dx)
    }
}
