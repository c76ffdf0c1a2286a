//! The whole model over a micro-batch: loss, gradients, logits.

use candle_core::Tensor;
use lora_ops::cross_entropy::{self, Loss, Targets};
use lora_spec::{ActivationCheckpointing, MicroBatch};

use crate::block::SavedActivations;
use crate::pass::{DropoutMasks, Pass};
use crate::{Adapter, Base, Gradients, ModelError};

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

/// The backward pass of a micro-batch, after its forward pass. It runs block by block, starting
/// with the last block.
pub struct Backward<'a> {
    base: &'a Base,
    pass: Pass<'a>,
    /// Input and saved activations of each block, from the lowest trained block to the last one.
    blocks: Vec<(Tensor, SavedActivations)>,
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
        batch: &MicroBatch,
        options: PassOptions,
    ) -> Result<(Loss, Self), ModelError> {
        let targets = Targets::new(&batch.targets, &batch.weights, base.device())?;
        let dropout = DropoutMasks::new(batch, options, base.device())?;
        let mut pass = base.pass_over(Some(adapter), batch)?;
        pass.dropout = dropout;
        let lowest = adapter.layout().modules.iter().map(|adapted| adapted.module.layer).min().unwrap_or(0);
        let mut blocks = Vec::new();
        let x = base.forward(&batch.tokens, &mut pass, None, |layer, x, activations| {
            if layer >= lowest {
                blocks.push((x, activations.into_saved(options.checkpointing)));
            }
        })?;
        let (normed, norm) = base.norm.forward(&x)?;
        let mut loss = cross_entropy::forward_backward(&normed, base.head(), &targets, true)?;
        drop(normed);
        let Some(d_normed) = loss.dx.take() else {
            return Err(candle_core::Error::Msg("the loss has no gradient".into()).into());
        };
        let dy = base.norm.backward(&norm, &x, &d_normed, None)?;
        Ok((loss, Self { base, pass, blocks, lowest, dy }))
    }

    /// Runs the backward pass of the next block and adds its gradients (of the unnormalized loss)
    /// to `grads`. Returns the index of the block, or `None` if all blocks are done.
    pub fn next_block(&mut self, grads: &Gradients) -> Result<Option<usize>, ModelError> {
        let Some((x, saved)) = self.blocks.pop() else { return Ok(None) };
        let layer = self.lowest + self.blocks.len();
        let block = &self.base.blocks[layer];
        let activations = block.recompute(saved, &x, &self.pass)?;
        let need_dx = layer > self.lowest;
        if let Some(dx) = block.backward(&activations, &x, &self.dy, &self.pass, grads, need_dx)? {
            self.dy = dx;
        }
        // An adapter of the embeddings belongs to the first block.
        if layer == 0
            && let Some(embedding) = &self.base.per_layer_embedding
            && let Some((saved, gradients)) = self.pass.layer_inputs.gradients()?
        {
            embedding.backward(saved, &x, &gradients, &self.pass, grads)?;
        }
        Ok(Some(layer))
    }
}

/// Returns the micro-batch's loss, and adds the gradients of the unnormalized loss to `grads`.
pub fn forward_backward(
    base: &Base,
    adapter: &Adapter,
    grads: &Gradients,
    batch: &MicroBatch,
    options: PassOptions,
) -> Result<Loss, ModelError> {
    let (loss, mut backward) = Backward::forward(base, adapter, batch, options)?;
    while backward.next_block(grads)?.is_some() {}
    Ok(loss)
}

/// Returns the micro-batch's loss, without gradients and without dropout.
pub fn loss(base: &Base, adapter: Option<&Adapter>, batch: &MicroBatch) -> Result<Loss, ModelError> {
    let targets = Targets::new(&batch.targets, &batch.weights, base.device())?;
    let normed = hidden_states(base, adapter, batch)?;
    Ok(cross_entropy::forward_backward(&normed, base.head(), &targets, false)?)
}

/// Returns the logits of every position, f32 `[rows * seq_len, vocab]`.
pub fn logits(base: &Base, adapter: Option<&Adapter>, batch: &MicroBatch) -> Result<Tensor, ModelError> {
    base.logits(&hidden_states(base, adapter, batch)?)
}

/// Returns the normalized hidden states `[rows * seq_len, hidden]`, the input of [`Base::logits`].
pub fn hidden_states(
    base: &Base,
    adapter: Option<&Adapter>,
    batch: &MicroBatch,
) -> Result<Tensor, ModelError> {
    let mut pass = base.pass_over(adapter, batch)?;
    let x = base.forward(&batch.tokens, &mut pass, None, |_, _, _| ())?;
    Ok(base.norm.forward(&x)?.0)
}
