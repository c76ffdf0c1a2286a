//! The MLP of a block: `down_proj(activation(gate_proj(x)) * up_proj(x))`, or without a gate,
//! `down_proj(activation(up_proj(x)))`.

use candle_core::Tensor;
use lora_ops::glu;
use lora_ops::lora::LoraActivations;
use lora_spec::{ActivationFunction, MlpConfig};

use crate::pass::Pass;
use crate::projection::{Linear, Projection};
use crate::split_projection::{Parts, SplitProjection};
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// An MLP.
#[derive(Debug)]
pub(crate) struct Mlp {
    gate_up_proj: SplitProjection,
    down_proj: Linear,
    activation: ActivationFunction,
}

/// Intermediate results of the forward pass that the backward pass reads.
pub(crate) struct MlpActivations {
    gate_up: Parts,
    down: Option<LoraActivations>,
}

impl Mlp {
    pub(crate) fn load(config: &MlpConfig, weights: &impl WeightSource) -> Result<Self, ModelError> {
        let width = config.down_proj.in_features;
        let widths = if config.is_gated { vec![width, width] } else { vec![width] };
        Ok(Self {
            gate_up_proj: SplitProjection::load(&config.gate_up_proj, widths, weights)?,
            down_proj: Linear::load(&config.down_proj, weights)?,
            activation: config.activation,
        })
    }

    /// Iterates over the linear modules in the order of computation.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.gate_up_proj.modules.iter().chain([&self.down_proj])
    }

    /// Returns whether a projection has an adapter in `pass`.
    pub(crate) fn is_trained(&self, pass: &Pass) -> bool {
        self.linears().any(|linear| pass.projection(linear).is_trained())
    }

    /// Returns the output for `x`, both `[tokens, hidden]`, and the activations.
    pub(crate) fn forward(&self, x: Tensor, pass: &Pass) -> Result<(Tensor, MlpActivations), ModelError> {
        let gate_up = self.gate_up_proj.forward(&x, pass)?;
        drop(x);
        let down = pass.projection(&self.down_proj).forward(&self.gated(&gate_up)?)?;
        Ok((down.y, MlpActivations { gate_up, down: down.lora }))
    }

    /// Recomputes the activations of the forward pass over `x`, with the same bits. The product
    /// with the frozen weight of `down_proj` is not recomputed, because the backward pass does not
    /// need it.
    pub(crate) fn recompute(&self, x: Tensor, pass: &Pass) -> Result<MlpActivations, ModelError> {
        let gate_up = self.gate_up_proj.forward(&x, pass)?;
        drop(x);
        let down = pass.projection(&self.down_proj).recompute(|| self.gated(&gate_up))?;
        Ok(MlpActivations { gate_up, down })
    }

    /// Returns the input of `down_proj`.
    fn gated(&self, gate_up: &Parts) -> Result<Tensor, ModelError> {
        Ok(match gate_up.y.as_slice() {
            [gate, up] => glu::forward(gate, up, self.activation)?,
            [up] => glu::activation_forward(up, self.activation)?,
            others => return Err(wrong_inputs(others)),
        })
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
        let MlpActivations { gate_up, down } = saved;
        let down_proj = pass.projection(&self.down_proj);
        let need_d_gated = need_dx || self.gate_up_proj.is_trained(pass);
        let d_gated = Projection::backward(
            &[down_proj.output_grad(down, dy)],
            || self.gated(gate_up),
            grads,
            need_d_gated,
        )?;
        let Some(d_gated) = d_gated else { return Ok(None) };
        let d_gate_up = match gate_up.y.as_slice() {
            [gate, up] => {
                glu::backward(gate, up, &d_gated, self.activation).map(|(gate, up)| vec![gate, up])?
            }
            [up] => vec![glu::activation_backward(up, &d_gated, self.activation)?],
            others => return Err(wrong_inputs(others)),
        };
        drop(d_gated);
        self.gate_up_proj.backward(gate_up, d_gate_up, x, pass, grads, need_dx)
    }
}

fn wrong_inputs(inputs: &[Tensor]) -> ModelError {
    candle_core::Error::Msg(format!("an MLP has {} inputs", inputs.len())).into()
}
