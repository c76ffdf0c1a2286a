//! One decoder block: `h = x + attn(x)`, then `h + mlp(h)`, or both side by side,
//! `x + attn(x) + mlp(x)`, with the norms and the factors of the architecture.

use candle_core::Tensor;
use lora_ops::add_assign;
use lora_ops::pointwise::scaled;
use lora_ops::transfer::to_vec;
use lora_spec::{ActivationCheckpointing, BlockConfig};

use crate::attention::{AttendedValues, Attention, AttentionActivations, AttentionSource, KvCache};
use crate::layer_input::{LayerInput, LayerInputActivations};
use crate::mlp::{Mlp, MlpActivations};
use crate::norm::Norm;
use crate::pass::Pass;
use crate::projection::Linear;
use crate::residual::{InputActivations, OutputActivations, ResidualInput, ResidualOutput};
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// A block's frozen modules.
#[derive(Debug)]
pub(crate) struct Block {
    attn_input: ResidualInput,
    pub(crate) attn: Attention,
    attn_output: ResidualOutput,
    mlp_input: ResidualInput,
    /// Whether the input of the MLP is that of attention.
    is_parallel: bool,
    mlp: Mlp,
    mlp_output: ResidualOutput,
    layer_input: Option<LayerInput>,
    pub(crate) output_scale: Option<OutputScale>,
}

/// The factor of a block's output.
#[derive(Debug)]
pub(crate) struct OutputScale {
    /// Name of the tensor.
    pub(crate) name: String,
    /// The tensor in the base's files, `[1]`, f32.
    pub(crate) stored: Tensor,
    value: f64,
}

impl OutputScale {
    fn load(name: &str, weights: &impl WeightSource) -> Result<Self, ModelError> {
        let stored = weights.vector(name)?;
        let value = to_vec::<f32>(&stored)?.first().copied().map_or(1.0, f64::from);
        Ok(Self { name: name.to_owned(), stored, value })
    }
}

/// Intermediate results of a block's forward pass that its backward pass reads.
pub(crate) struct Activations {
    before_mlp: ActivationsBeforeMlp,
    mlp: MlpActivations,
    mlp_output: OutputActivations,
    layer_input: Option<LayerInputActivations>,
}

struct ActivationsBeforeMlp {
    attn_input: InputActivations,
    attn: AttentionActivations,
    attn_output: OutputActivations,
    /// The residual stream between attention and MLP, `[tokens, hidden]`.
    h: Tensor,
    mlp_input: InputActivations,
}

/// The part of [`Activations`] that is kept between the passes. [`Block::recompute`] computes the
/// rest.
pub(crate) enum SavedActivations {
    Everything(Box<Activations>),
    Attention(AttendedValues),
    Nothing,
}

impl Activations {
    /// Drops the activations that `checkpointing` recomputes.
    pub(crate) fn into_saved(self, checkpointing: ActivationCheckpointing) -> SavedActivations {
        match checkpointing {
            ActivationCheckpointing::None => SavedActivations::Everything(Box::new(self)),
            ActivationCheckpointing::BlockSaveAttention => {
                SavedActivations::Attention(self.before_mlp.attn.attended)
            }
            ActivationCheckpointing::Block => SavedActivations::Nothing,
        }
    }
}

impl Block {
    pub(crate) fn load(config: &BlockConfig, weights: &impl WeightSource) -> Result<Self, ModelError> {
        let input = |norm: &Option<_>| ResidualInput::load(norm.as_ref(), weights);
        let output =
            |norm: &Option<_>| ResidualOutput::load(norm.as_ref(), config.residual_multiplier, weights);
        Ok(Self {
            attn_input: input(&config.attn_norm)?,
            attn: Attention::load(&config.attn, weights)?,
            attn_output: output(&config.attn_out_norm)?,
            mlp_input: input(&config.mlp_norm)?,
            is_parallel: config.is_parallel,
            mlp: Mlp::load(&config.mlp, weights)?,
            mlp_output: output(&config.mlp_out_norm)?,
            layer_input: config
                .layer_input
                .as_ref()
                .map(|input| LayerInput::load(input, weights))
                .transpose()?,
            output_scale: config
                .output_scale
                .as_ref()
                .map(|name| OutputScale::load(name, weights))
                .transpose()?,
        })
    }

    /// Iterates over the linear modules in the order of computation.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let layer_input = self.layer_input.iter().flat_map(LayerInput::linears);
        self.attn.linears().chain(self.mlp.linears()).chain(layer_input)
    }

    /// Iterates over the norms.
    pub(crate) fn norms(&self) -> impl Iterator<Item = &Norm> {
        let Self { attn_input, attn_output, mlp_input, mlp_output, .. } = self;
        let layer_input = self.layer_input.as_ref().and_then(|input| input.output.norm.as_ref());
        let residual = [&attn_input.norm, &attn_output.norm, &mlp_input.norm, &mlp_output.norm];
        residual.into_iter().flatten().chain(self.attn.norms()).chain(layer_input)
    }

    /// Returns the size of the weights in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let norms: usize = self.norms().map(Norm::bytes).sum();
        let scale = self.output_scale.as_ref().map_or(0, |scale| 4 * scale.stored.elem_count());
        scale + norms + self.linears().map(|linear| linear.frozen.bytes()).sum::<usize>()
    }

    /// The forward pass: returns the block's output for `x`, both `[tokens, hidden]`, and the
    /// activations. With a `cache`, the tokens also attend to the cached ones.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut KvCache>,
    ) -> Result<(Tensor, Activations), ModelError> {
        let source = cache.map_or(AttentionSource::Pass, AttentionSource::Cache);
        let (mlp_input, before_mlp) = self.forward_to_mlp(x, pass, source)?;
        let (y, mlp) = self.mlp.forward(mlp_input, pass)?;
        let (y, mlp_output) = self.mlp_output.forward(y)?;
        add_assign(&y, &before_mlp.h)?;
        let (y, layer_input) = self.add_layer_input(y, pass)?;
        Ok((self.scaled(y)?, Activations { before_mlp, mlp, mlp_output, layer_input }))
    }

    /// Recomputes the activations that were not saved in the forward pass over `x`, with the same
    /// bits.
    pub(crate) fn recompute(
        &self,
        saved: SavedActivations,
        x: &Tensor,
        pass: &Pass,
    ) -> Result<Activations, ModelError> {
        let source = match saved {
            SavedActivations::Everything(activations) => return Ok(*activations),
            SavedActivations::Attention(attended) => AttentionSource::Saved(attended),
            SavedActivations::Nothing => AttentionSource::Pass,
        };
        let (mlp_input, before_mlp) = self.forward_to_mlp(x, pass, source)?;
        if self.mlp_output.norm.is_none() && self.layer_input.is_none() {
            let (mlp, mlp_output) = (self.mlp.recompute(mlp_input, pass)?, OutputActivations::default());
            return Ok(Activations { before_mlp, mlp, mlp_output, layer_input: None });
        }
        let (y, mlp) = self.mlp.forward(mlp_input, pass)?;
        let (y, mlp_output) = self.mlp_output.forward(y)?;
        let layer_input = if self.layer_input.is_some() {
            add_assign(&y, &before_mlp.h)?;
            self.add_layer_input(y, pass)?.1
        } else {
            None
        };
        Ok(Activations { before_mlp, mlp, mlp_output, layer_input })
    }

    /// Adds the block's own embedding to the residual stream `h` `[tokens, hidden]`, if there is
    /// one.
    fn add_layer_input(
        &self,
        h: Tensor,
        pass: &Pass,
    ) -> Result<(Tensor, Option<LayerInputActivations>), ModelError> {
        let Some(layer_input) = &self.layer_input else { return Ok((h, None)) };
        let (y, activations) = layer_input.forward(h, pass)?;
        Ok((y, Some(activations)))
    }

    /// Multiplies the block's output, or its gradient, by the block's factor.
    fn scaled(&self, x: Tensor) -> Result<Tensor, ModelError> {
        match &self.output_scale {
            None => Ok(x),
            Some(scale) => Ok(scaled(&x, scale.value)?),
        }
    }

    /// Returns the input of the MLP, and the activations of its computation.
    fn forward_to_mlp(
        &self,
        x: &Tensor,
        pass: &Pass,
        source: AttentionSource,
    ) -> Result<(Tensor, ActivationsBeforeMlp), ModelError> {
        let (input, attn_input) = self.attn_input.forward(x)?;
        let parallel_input = self.is_parallel.then(|| input.clone());
        let (h, attn) = self.attn.forward(input, pass, source)?;
        let (h, attn_output) = self.attn_output.forward(h)?;
        let (input, mlp_input) = self.mlp_input.add_forward(&h, x)?;
        let input = parallel_input.unwrap_or(input);
        Ok((input, ActivationsBeforeMlp { attn_input, attn, attn_output, h, mlp_input }))
    }

    /// The backward pass: adds the gradients of the block's adapters to `grads` and returns the
    /// gradient of `x`. If `need_dx` is false, because no block below is trained, the pass ends at
    /// the lowest trained projection and returns `None`.
    pub(crate) fn backward(
        &self,
        activations: &Activations,
        x: &Tensor,
        dy: &Tensor,
        pass: &Pass,
        grads: &Gradients,
        need_dx: bool,
    ) -> Result<Option<Tensor>, ModelError> {
        let Activations {
            before_mlp: ActivationsBeforeMlp { attn_input, attn, attn_output, h, mlp_input },
            mlp,
            mlp_output,
            layer_input,
        } = activations;
        let need_dh = need_dx || self.attn.is_trained(pass);
        let mut dy = self.scaled(dy.clone())?;
        if let (Some(input), Some(saved)) = (&self.layer_input, layer_input) {
            let need_dy = need_dh || self.mlp.is_trained(pass);
            match input.backward(saved, &dy, pass, grads, need_dy)? {
                None => return Ok(None),
                Some(dh) => dy = dh,
            }
        }
        let dy = &dy;
        let d_output = self.mlp_output.backward(mlp_output, dy)?;
        let input = || match self.is_parallel {
            true => self.attn_input.recompute(attn_input, x),
            false => self.mlp_input.recompute(mlp_input, h),
        };
        let need_d_input = if self.is_parallel { need_dx } else { need_dh };
        let d_input = self.mlp.backward(mlp, input, &d_output, pass, grads, need_d_input)?;
        drop(d_output);
        let (dh, d_parallel) = match d_input {
            _ if self.is_parallel => (dy.clone(), d_input),
            Some(d_input) => (self.mlp_input.backward(mlp_input, h, d_input, dy)?, None),
            None => return Ok(None),
        };
        let d_output = self.attn_output.backward(attn_output, &dh)?;
        let input = || self.attn_input.recompute(attn_input, x);
        let d_input = self.attn.backward(attn, input, &d_output, pass, grads, need_dx)?;
        let Some(d_input) = d_input else { return Ok(None) };
        drop(d_output);
        if let Some(d_parallel) = d_parallel {
            add_assign(&d_input, &d_parallel)?;
        }
        Ok(Some(self.attn_input.backward(attn_input, x, d_input, &dh)?))
    }
}
