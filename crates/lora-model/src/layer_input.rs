//! The part of a block that adds its own embedding `p` of the token (Gemma 4 E2B and E4B):
//! `h + norm(projection(activation(gate(h)) * p))`.

use candle_core::Tensor;
use lora_ops::lora::LoraActivations;
use lora_ops::{add_assign, glu};
use lora_spec::{ActivationFunction, LayerInputConfig};

use crate::pass::Pass;
use crate::projection::{Linear, Projection};
use crate::residual::{OutputActivations, ResidualOutput};
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// The modules that add a block's embedding.
#[derive(Debug)]
pub(crate) struct LayerInput {
    /// Index of the block.
    layer: usize,
    gate: Linear,
    projection: Linear,
    pub(crate) output: ResidualOutput,
    activation: ActivationFunction,
}

/// Intermediate results of the forward pass that the backward pass reads.
pub(crate) struct LayerInputActivations {
    /// The residual stream before the embedding is added, `[tokens, hidden]`.
    h: Tensor,
    /// The output of `gate`, `[tokens, features]`.
    gated: Tensor,
    gate: Option<LoraActivations>,
    projection: Option<LoraActivations>,
    output: OutputActivations,
}

impl LayerInput {
    pub(crate) fn load(config: &LayerInputConfig, weights: &impl WeightSource) -> Result<Self, ModelError> {
        Ok(Self {
            layer: config.gate.layer,
            gate: Linear::load(&config.gate, weights)?,
            projection: Linear::load(&config.projection, weights)?,
            output: ResidualOutput::load(Some(&config.out_norm), 1.0, weights)?,
            activation: config.activation,
        })
    }

    /// Iterates over the linear modules in the order of computation.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        [&self.gate, &self.projection].into_iter()
    }

    /// Returns the residual stream with the embedding, and the activations.
    pub(crate) fn forward(
        &self,
        h: Tensor,
        pass: &Pass,
    ) -> Result<(Tensor, LayerInputActivations), ModelError> {
        let gate = pass.projection(&self.gate).forward(&h)?;
        let embedded = glu::forward(&gate.y, pass.layer_inputs.get(self.layer)?, self.activation)?;
        let projected = pass.projection(&self.projection).forward(&embedded)?;
        let (y, output) = self.output.forward(projected.y)?;
        add_assign(&y, &h)?;
        let (gate, gated) = (gate.lora, gate.y);
        Ok((y, LayerInputActivations { h, gated, gate, projection: projected.lora, output }))
    }

    /// The backward pass: adds the gradients of the adapters to `grads` and returns the gradient of
    /// the residual stream if `need_dh` is set.
    pub(crate) fn backward(
        &self,
        saved: &LayerInputActivations,
        dy: &Tensor,
        pass: &Pass,
        grads: &Gradients,
        need_dh: bool,
    ) -> Result<Option<Tensor>, ModelError> {
        let LayerInputActivations { h, gated, gate, projection, output } = saved;
        let input = pass.layer_inputs.get(self.layer)?;
        let d_projected = self.output.backward(output, dy)?;
        let gate_projection = pass.projection(&self.gate);
        let need_d_embedded = need_dh || gate_projection.is_trained() || pass.layer_inputs.are_trained();
        let d_embedded = Projection::backward(
            &[pass.projection(&self.projection).output_grad(projection, &d_projected)],
            || Ok(glu::forward(gated, input, self.activation)?),
            grads,
            need_d_embedded,
        )?;
        let Some(d_embedded) = d_embedded else { return Ok(None) };
        let (d_gate, d_input) = glu::backward(gated, input, &d_embedded, self.activation)?;
        pass.layer_inputs.put_gradient(self.layer, d_input);
        let output = gate_projection.output_grad(gate, &d_gate);
        let dh = Projection::backward(&[output], || Ok(h.clone()), grads, need_dh)?;
        if let Some(dh) = &dh {
            add_assign(dh, dy)?;
        }
        Ok(dh)
    }
}
