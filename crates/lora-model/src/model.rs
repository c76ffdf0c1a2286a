//! The whole model over a micro-batch: loss, gradients, logits.

use std::sync::Arc;

use candle_core::Tensor;
use lora_ops::attention::Shape;
use lora_ops::cross_entropy::{self, Loss, Targets};
use lora_ops::dropout::Dropout;
use lora_ops::rope::RopeTable;
use lora_ops::{embedding, rms_norm};
use lora_spec::{ActivationCheckpointing, ModelConfig};

use crate::block::{self, Context};
use crate::{Adapter, Base, Gradients, ModelError};

/// A micro-batch: `batch` rows of `seq` tokens, padded on the right (a pad has weight 0 and nothing looks back at it).
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Rows.
    pub batch: usize,
    /// Positions of a row.
    pub seq: usize,
    /// Input tokens `[batch, seq]`.
    pub tokens: &'a [u32],
    /// Token that each position should predict `[batch, seq]`.
    pub targets: &'a [u32],
    /// Weight of each position's loss `[batch, seq]`.
    pub weights: &'a [f32],
    /// Index of each row in the dataset, which keys its dropout.
    pub rows: &'a [u64],
}

/// Settings of a training pass.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// What is recomputed backward.
    pub checkpointing: ActivationCheckpointing,
    /// `lora_dropout`.
    pub dropout: f64,
    /// Keys the dropout.
    pub seed: u64,
    /// Keys the dropout.
    pub step: u64,
}

/// The micro-batch's loss, and its unnormalized gradient (of `loss_sum`) added to `grads`.
pub fn forward_backward(
    base: &Base,
    adapter: &Adapter,
    grads: &Gradients,
    batch: Batch,
    pass: Pass,
) -> Result<Loss, ModelError> {
    let config = &base.config;
    let rope = rope_table(config, batch.seq);
    let masks = dropout_masks(config, &batch, pass);
    let context = |layer: usize| context(config, &rope, Some(adapter), masks.as_deref(), &batch, layer);
    let slots = &adapter.layout().slots;
    let lowest = slots.iter().map(|slot| slot.module.layer).min().unwrap_or(0);

    let mut x = embedding::forward(&base.embedding, batch.tokens)?;
    let mut inputs = Vec::new();
    for (layer, block) in base.blocks.iter().enumerate() {
        let (y, saved) = block.forward(&x, &context(layer))?;
        if layer >= lowest {
            let keep = pass.checkpointing == ActivationCheckpointing::None;
            inputs.push((x, keep.then_some(saved)));
        }
        x = y;
    }
    let (normed, norm) = rms_norm::forward(&x, &base.norm, config.rms_norm_eps)?;
    let targets = Targets { tokens: batch.targets, weights: batch.weights };
    let mut loss = cross_entropy::forward_backward(&normed, base.head.weight(), targets, true)?;
    drop(normed);
    let Some(d_normed) = loss.dx.take() else { return Ok(loss) };
    let mut dy = rms_norm::backward(&norm, &x, &base.norm, &d_normed)?;
    drop((d_normed, x));
    for layer in (lowest..config.num_hidden_layers).rev() {
        let Some((x, saved)) = inputs.pop() else { break };
        let (block, context) = (&base.blocks[layer], context(layer));
        let saved = match saved {
            Some(saved) => saved,
            None => block.forward(&x, &context)?.1,
        };
        match block.backward(&saved, &x, &dy, &context, grads.block(layer), layer > lowest)? {
            Some(dx) => dy = dx,
            None => break,
        }
    }
    Ok(loss)
}

/// The micro-batch's loss alone, without dropout.
pub fn loss(base: &Base, adapter: Option<&Adapter>, batch: Batch) -> Result<Loss, ModelError> {
    let normed = hidden(base, adapter, &batch)?;
    let targets = Targets { tokens: batch.targets, weights: batch.weights };
    Ok(cross_entropy::forward_backward(&normed, base.head.weight(), targets, false)?)
}

/// Logits `[batch * seq, vocab]` of every position, f32.
pub fn logits(base: &Base, adapter: Option<&Adapter>, batch: Batch) -> Result<Tensor, ModelError> {
    Ok(base.head.forward(&hidden(base, adapter, &batch)?)?)
}

/// The normalized hidden states that the head sees, `[batch * seq, hidden]`.
fn hidden(base: &Base, adapter: Option<&Adapter>, batch: &Batch) -> Result<Tensor, ModelError> {
    let rope = rope_table(&base.config, batch.seq);
    let mut x = embedding::forward(&base.embedding, batch.tokens)?;
    for (layer, block) in base.blocks.iter().enumerate() {
        x = block.forward(&x, &context(&base.config, &rope, adapter, None, batch, layer))?.0;
    }
    Ok(rms_norm::forward(&x, &base.norm, base.config.rms_norm_eps)?.0)
}

pub(crate) fn rope_table(config: &ModelConfig, positions: usize) -> RopeTable {
    RopeTable::new(&config.rope, config.head_dim, positions)
}

fn context<'a>(
    config: &ModelConfig,
    rope: &'a RopeTable,
    adapter: Option<&'a Adapter>,
    masks: Option<&'a [Vec<Dropout>]>,
    batch: &Batch,
    layer: usize,
) -> Context<'a> {
    Context {
        shape: attention_shape(config, batch.batch, batch.seq, batch.seq),
        rope,
        eps: config.rms_norm_eps,
        lora: adapter.map(|adapter| adapter.block(layer)),
        scaling: adapter.map_or(0.0, Adapter::scaling),
        dropout: masks.map(|masks| masks[layer].as_slice()),
    }
}

pub(crate) fn attention_shape(config: &ModelConfig, batch: usize, seq: usize, kv_seq: usize) -> Shape {
    Shape {
        batch,
        seq,
        kv_seq,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    }
}

/// Masks of every projection, `[block][projection]`; `None` without dropout.
fn dropout_masks(config: &ModelConfig, batch: &Batch, pass: Pass) -> Option<Vec<Vec<Dropout>>> {
    if pass.dropout == 0.0 {
        return None;
    }
    let tokens: Arc<[(u32, u32)]> =
        batch.rows.iter().flat_map(|&row| (0..batch.seq as u32).map(move |p| (row as u32, p))).collect();
    let modules = config.linear_modules();
    let masks = modules.chunks(block::Block::PROJECTIONS).map(|block| {
        block
            .iter()
            .map(|m| Dropout::new(pass.seed, &m.name, pass.step, pass.dropout, tokens.clone()))
            .collect()
    });
    Some(masks.collect())
}
