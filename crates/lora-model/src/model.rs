//! The whole model over a micro-batch: loss, gradients, logits.

use std::sync::Arc;

use candle_core::Tensor;
use lora_ops::attention::{AttentionShape, first_visible_keys};
use lora_ops::cross_entropy::{self, Loss, Targets};
use lora_ops::dropout::Dropout;
use lora_ops::rope::RopeTable;
use lora_ops::{Ids, embedding, rms_norm};
use lora_spec::{ActivationCheckpointing, ModelConfig};

use crate::block::{self, BlockContext};
use crate::{Adapter, Base, Gradients, ModelError};

/// A micro-batch: `batch` rows of `seq` tokens, padded on the right. A padding position has weight
/// 0, and no other position attends to it.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Number of rows.
    pub batch: usize,
    /// Number of positions of each row.
    pub seq: usize,
    /// Input tokens `[batch, seq]`.
    pub tokens: &'a [u32],
    /// Target token of each position `[batch, seq]`.
    pub targets: &'a [u32],
    /// Weight of each position's loss `[batch, seq]`.
    pub weights: &'a [f32],
    /// Index of each row in the dataset `[batch]`. Dropout depends on it.
    pub rows: &'a [u64],
}

/// Settings of a training pass.
#[derive(Debug, Clone, Copy)]
pub struct PassOptions {
    /// Which activations are recomputed in the backward pass.
    pub checkpointing: ActivationCheckpointing,
    /// `lora_dropout`.
    pub dropout: f64,
    /// Seed of dropout.
    pub seed: u64,
    /// Number of the step. Dropout depends on it.
    pub step: u64,
}

/// A micro-batch on the base's device, with the inputs that all blocks share.
struct ModelInputs<'a> {
    base: &'a Base,
    adapter: Option<&'a Adapter>,
    shape: AttentionShape,
    tokens: Ids,
    rope: Arc<RopeTable>,
    /// First visible key of each query, for layers with a sliding window.
    first: Option<Ids>,
    /// Dropout masks `[block][projection]`; `None` without dropout.
    masks: Option<Vec<Vec<Dropout>>>,
}

impl<'a> ModelInputs<'a> {
    fn new(
        base: &'a Base,
        adapter: Option<&'a Adapter>,
        batch: &Batch,
        pass: Option<PassOptions>,
    ) -> Result<Self, ModelError> {
        let first = window_first_keys(base, batch.batch, batch.seq, 0)?;
        Ok(Self {
            shape: attention_shape(&base.config, batch.batch, batch.seq, batch.seq),
            tokens: Ids::new(batch.tokens, base.device())?,
            rope: base.rope(batch.seq)?,
            masks: pass.map(|pass| dropout_masks(base, batch, pass)).transpose()?.flatten(),
            first,
            base,
            adapter,
        })
    }

    fn block(&self, layer: usize) -> BlockContext<'_> {
        BlockContext {
            shape: self.shape,
            rope: &self.rope,
            eps: self.base.config.rms_norm_eps,
            activation: self.base.config.hidden_act,
            first: self.first.as_ref().filter(|_| self.base.config.sliding_window(layer).is_some()),
            lora: self.adapter.map(|adapter| adapter.block(layer)),
            initial: self.adapter.and_then(|adapter| adapter.initial_block(layer)),
            scaling: self.adapter.map_or(0.0, Adapter::scaling),
            dropout: self.masks.as_ref().map(|masks| masks[layer].as_slice()),
        }
    }

    fn embed(&self) -> Result<Tensor, ModelError> {
        Ok(embedding::forward(&self.base.embedding, &self.tokens)?)
    }
}

/// The backward pass of a micro-batch, after its forward pass. It runs block by block, starting
/// with the last block.
pub struct Backward<'a> {
    inputs: ModelInputs<'a>,
    /// Input and saved activations of each block, from the lowest trained block to the last one.
    blocks: Vec<(Tensor, block::SavedActivations)>,
    /// Index of the lowest trained block.
    lowest: usize,
    /// Gradient of the output of the next block.
    dy: Tensor,
}

impl<'a> Backward<'a> {
    /// Runs the forward pass. Returns the loss and the backward pass, which has not started.
    pub fn forward(
        base: &'a Base,
        adapter: &'a Adapter,
        batch: Batch,
        pass: PassOptions,
    ) -> Result<(Loss, Self), ModelError> {
        let config = &base.config;
        let targets = Targets::new(batch.targets, batch.weights, base.device())?;
        let inputs = ModelInputs::new(base, Some(adapter), &batch, Some(pass))?;
        let modules = &adapter.layout().modules;
        let lowest = modules.iter().map(|slot| slot.module.layer).min().unwrap_or(0);
        let mut x = inputs.embed()?;
        let mut blocks = Vec::new();
        for (layer, block) in base.blocks.iter().enumerate() {
            let (y, activations) = block.forward(&x, &inputs.block(layer))?;
            if layer >= lowest {
                blocks.push((x, activations.into_saved(pass.checkpointing)));
            }
            x = y;
        }
        let (normed, norm) = rms_norm::forward(&x, &base.norm, config.rms_norm_eps)?;
        let mut loss = cross_entropy::forward_backward(&normed, &base.head, &targets, true)?;
        drop(normed);
        let Some(d_normed) = loss.dx.take() else {
            return Err(candle_core::Error::Msg("the loss has no gradient".into()).into());
        };
        let dy = rms_norm::backward(&norm, &x, &base.norm, &d_normed, None)?;
        Ok((loss, Self { inputs, blocks, lowest, dy }))
    }

    /// Runs the backward pass of the next block and adds its gradients (of the unnormalized loss)
    /// to `grads`. Returns the index of the block, or `None` if all blocks are done.
    pub fn next_block(&mut self, grads: &Gradients) -> Result<Option<usize>, ModelError> {
        let Some((x, saved)) = self.blocks.pop() else { return Ok(None) };
        let layer = self.lowest + self.blocks.len();
        let (block, context) = (&self.inputs.base.blocks[layer], self.inputs.block(layer));
        let activations = block.recompute(saved, &x, &context)?;
        let dx =
            block.backward(&activations, &x, &self.dy, &context, grads.block(layer), layer > self.lowest)?;
        if let Some(dx) = dx {
            self.dy = dx;
        }
        Ok(Some(layer))
    }
}

/// Returns the micro-batch's loss, and adds the gradients of the unnormalized loss to `grads`.
pub fn forward_backward(
    base: &Base,
    adapter: &Adapter,
    grads: &Gradients,
    batch: Batch,
    pass: PassOptions,
) -> Result<Loss, ModelError> {
    let (loss, mut backward) = Backward::forward(base, adapter, batch, pass)?;
    while backward.next_block(grads)?.is_some() {}
    Ok(loss)
}

/// Returns the micro-batch's loss, without gradients and without dropout.
pub fn loss(base: &Base, adapter: Option<&Adapter>, batch: Batch) -> Result<Loss, ModelError> {
    let targets = Targets::new(batch.targets, batch.weights, base.device())?;
    let normed = final_hidden_states(base, adapter, &batch)?;
    Ok(cross_entropy::forward_backward(&normed, &base.head, &targets, false)?)
}

/// Returns the logits of every position, f32 `[batch * seq, vocab]`.
pub fn logits(base: &Base, adapter: Option<&Adapter>, batch: Batch) -> Result<Tensor, ModelError> {
    base.logits(&final_hidden_states(base, adapter, &batch)?)
}

/// Returns the normalized hidden states `[batch * seq, hidden]`, the input of the head.
fn final_hidden_states(base: &Base, adapter: Option<&Adapter>, batch: &Batch) -> Result<Tensor, ModelError> {
    let inputs = ModelInputs::new(base, adapter, batch, None)?;
    let mut x = inputs.embed()?;
    for (layer, block) in base.blocks.iter().enumerate() {
        x = block.forward(&x, &inputs.block(layer))?.0;
    }
    Ok(rms_norm::forward(&x, &base.norm, base.config.rms_norm_eps)?.0)
}

/// Returns the first visible keys of the queries `past..past + seq` of each row, for the layers
/// with a sliding window. Returns `None` if no layer has a window that is shorter than the rows.
pub(crate) fn window_first_keys(
    base: &Base,
    batch: usize,
    seq: usize,
    past: usize,
) -> Result<Option<Ids>, ModelError> {
    let config = &base.config;
    let Some(window) = (0..config.num_hidden_layers).find_map(|layer| config.sliding_window(layer)) else {
        return Ok(None);
    };
    if past + seq <= window {
        return Ok(None);
    }
    let all = first_visible_keys(batch, past + seq, Some(window), None);
    let queries = all.chunks(past + seq).flat_map(|row| &row[past..]).copied().collect::<Vec<u32>>();
    Ok(Some(Ids::new(queries, base.device())?))
}

pub(crate) fn attention_shape(
    config: &ModelConfig,
    batch: usize,
    seq: usize,
    kv_seq: usize,
) -> AttentionShape {
    AttentionShape {
        batch,
        seq,
        kv_seq,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    }
}

/// Returns the dropout masks `[block][projection]`; `None` without dropout.
fn dropout_masks(
    base: &Base,
    batch: &Batch,
    pass: PassOptions,
) -> Result<Option<Vec<Vec<Dropout>>>, ModelError> {
    if pass.dropout == 0.0 {
        return Ok(None);
    }
    let token = |row: u64| (0..batch.seq as u32).flat_map(move |position| [row as u32, position]);
    let tokens: Vec<u32> = batch.rows.iter().flat_map(|&row| token(row)).collect();
    let tokens = Ids::new(tokens, base.device())?;
    let modules = base.config.linear_modules();
    let masks = modules.chunks(block::Block::PROJECTIONS).map(|block| {
        block
            .iter()
            .map(|m| Dropout::new(pass.seed, &m.name, pass.step, pass.dropout, tokens.clone()))
            .collect()
    });
    Ok(Some(masks.collect()))
}
