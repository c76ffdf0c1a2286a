//! One decoder block: `h = x + attn(input_norm(x))`, then `h + mlp(post_attention_norm(h))`.

use candle_core::Tensor;
use lora_ops::add_assign;
use lora_ops::rms_norm::RmsNormActivations;
use lora_spec::{ActivationCheckpointing, BlockConfig};

use crate::attention::{AttendedValues, Attention, AttentionActivations, AttentionSource, KvCache};
use crate::mlp::{Mlp, MlpActivations};
use crate::norm::Norm;
use crate::pass::Pass;
use crate::projection::Linear;
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// A block's frozen modules.
#[derive(Debug)]
pub(crate) struct Block {
    input_norm: Norm,
    pub(crate) attn: Attention,
    post_attention_norm: Norm,
    mlp: Mlp,
}

/// Intermediate results of a block's forward pass that its backward pass reads.
pub(crate) struct Activations {
    before_mlp: ActivationsBeforeMlp,
    mlp: MlpActivations,
}

struct ActivationsBeforeMlp {
    input_norm: RmsNormActivations,
    attn: AttentionActivations,
    /// `x + attn(input_norm(x))` `[tokens, hidden]`.
    h: Tensor,
    post_attention_norm: RmsNormActivations,
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
        Ok(Self {
            input_norm: Norm::load(&config.input_norm, weights)?,
            attn: Attention::load(&config.attn, weights)?,
            post_attention_norm: Norm::load(&config.post_attention_norm, weights)?,
            mlp: Mlp::load(&config.mlp, weights)?,
        })
    }

    /// Iterates over the linear modules in the order of computation.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.attn.linears().into_iter().chain(self.mlp.linears())
    }

    /// Returns the norms in the order of computation.
    pub(crate) fn norms(&self) -> [&Norm; 2] {
        [&self.input_norm, &self.post_attention_norm]
    }

    /// Returns the size of the weights in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let norms: usize = self.norms().into_iter().map(Norm::bytes).sum();
        norms + self.linears().map(|linear| linear.frozen.bytes()).sum::<usize>()
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
        let (normed, before_mlp) = self.forward_to_mlp(x, pass, source)?;
        let (y, mlp) = self.mlp.forward(normed, pass)?;
        add_assign(&y, &before_mlp.h)?;
        Ok((y, Activations { before_mlp, mlp }))
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
        let (normed, before_mlp) = self.forward_to_mlp(x, pass, source)?;
        Ok(Activations { before_mlp, mlp: self.mlp.recompute(normed, pass)? })
    }

    /// Returns the input of the MLP, and the activations of its computation.
    fn forward_to_mlp(
        &self,
        x: &Tensor,
        pass: &Pass,
        source: AttentionSource,
    ) -> Result<(Tensor, ActivationsBeforeMlp), ModelError> {
        let (normed, input_norm) = self.input_norm.forward(x)?;
        let (h, attn) = self.attn.forward(normed, pass, source)?;
        let (normed, post_attention_norm) = self.post_attention_norm.add_forward(&h, x)?;
        Ok((normed, ActivationsBeforeMlp { input_norm, attn, h, post_attention_norm }))
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
            before_mlp: ActivationsBeforeMlp { input_norm, attn, h, post_attention_norm },
            mlp,
        } = activations;
        let need_dh = need_dx || self.attn.is_trained(pass);
        let normed = || self.post_attention_norm.recompute(post_attention_norm, h);
        let d_normed = self.mlp.backward(mlp, normed, dy, pass, grads, need_dh)?;
        let Some(d_normed) = d_normed else { return Ok(None) };
        let dh = self.post_attention_norm.backward(post_attention_norm, h, &d_normed, Some(dy))?;
        drop(d_normed);
        let normed = || self.input_norm.recompute(input_norm, x);
        let d_normed = self.attn.backward(attn, normed, &dh, pass, grads, need_dx)?;
        let Some(d_normed) = d_normed else { return Ok(None) };
        Ok(Some(self.input_norm.backward(input_norm, x, &d_normed, Some(&dh))?))
    }
}
