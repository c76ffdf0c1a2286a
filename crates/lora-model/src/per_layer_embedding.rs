//! Additional embeddings, of which each block gets its own part (Gemma 4 E2B and E4B):
//! `norm(projection(x)) + c table[token]`, where `x` is the token's embedding.

use candle_core::Tensor;
use lora_ops::pointwise::scaled;
use lora_ops::{Ids, add_assign, columns, embedding};
use lora_spec::PerLayerEmbeddingConfig;

use crate::norm::Norm;
use crate::pass::Pass;
use crate::projection::{Linear, Projection};
use crate::shared_inputs::PerLayerActivations;
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// The embeddings of all blocks.
#[derive(Debug)]
pub(crate) struct PerLayerEmbedding {
    /// Name of the table.
    pub(crate) name: String,
    /// `[vocab, layers * features]`.
    pub(crate) table: Tensor,
    pub(crate) projection: Linear,
    pub(crate) norm: Norm,
    multiplier: f64,
    /// Number of features of each block.
    widths: Vec<usize>,
}

impl PerLayerEmbedding {
    pub(crate) fn load(
        config: &PerLayerEmbeddingConfig,
        weights: &impl WeightSource,
    ) -> Result<Self, ModelError> {
        Ok(Self {
            name: config.table.clone(),
            table: weights.matrix(&format!("{}.weight", config.table))?,
            projection: Linear::load(&config.projection, weights)?,
            norm: Norm::load(&config.norm, weights)?,
            multiplier: config.multiplier,
            widths: vec![config.norm.features; config.projection.out_features / config.norm.features],
        })
    }

    /// Returns the size of the weights in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let table = self.table.elem_count() * self.table.dtype().size_in_bytes();
        table + self.projection.frozen.bytes() + self.norm.bytes()
    }

    /// Returns the embeddings of each block `[tokens, features]` for tokens with the embeddings `x`
    /// `[tokens, hidden]`. The activations are returned if the projection is trained.
    pub(crate) fn forward(
        &self,
        tokens: &Ids,
        x: &Tensor,
        pass: &Pass,
    ) -> Result<(Vec<Tensor>, Option<PerLayerActivations>), ModelError> {
        let projection = pass.projection(&self.projection);
        let projected = projection.forward(x)?;
        let (normed, norm) = self.norm.forward(&self.norm.groups(&projected.y)?)?;
        let all = normed.reshape(projected.y.shape())?;
        let saved = projection.is_trained().then_some(PerLayerActivations {
            projected: projected.y,
            norm,
            lora: projected.lora,
        });
        add_assign(&all, &scaled(&embedding::forward(&self.table, tokens)?, self.multiplier)?)?;
        Ok((columns::split(&all, &self.widths)?, saved))
    }

    /// The backward pass: adds the gradients of the projection's adapter to `grads`. `d_inputs` are
    /// the gradients of the embeddings of each block, and `x` are the embeddings of the tokens.
    pub(crate) fn backward(
        &self,
        saved: &PerLayerActivations,
        x: &Tensor,
        d_inputs: &[Tensor],
        pass: &Pass,
        grads: &Gradients,
    ) -> Result<(), ModelError> {
        let PerLayerActivations { projected, norm, lora } = saved;
        let d_normed = columns::join(d_inputs)?;
        let groups = |x: &Tensor| self.norm.groups(x);
        let d_projected = self.norm.backward(norm, &groups(projected)?, &groups(&d_normed)?, None)?;
        drop(d_normed);
        let d_projected = d_projected.reshape(projected.shape())?;
        let output = pass.projection(&self.projection).output_grad(lora, &d_projected);
        Projection::backward(&[output], || Ok(x.clone()), grads, false)?;
        Ok(())
    }
}
