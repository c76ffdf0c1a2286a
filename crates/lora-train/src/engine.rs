//! The operations of a training step: forward and backward pass, reduction, optimizer.
//! [`crate::Run`] decides which of them run when.
//!
//! On a GPU only [`Engine::losses`], the reduction and the end of a step wait for results. The host
//! is at most two micro-batches ahead of the GPU, so that a cancellation takes effect soon.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use lora_collective::tree::{NodeId, TreeAccumulator, nodes_in};
use lora_model::{Adapter, Backward, Base, Gradients, Loss, PassOptions, loss};
use lora_ops::adamw::{AdamW, clip_factor};
use lora_ops::add_assign;
use lora_ops::device::StreamEvent;
use lora_ops::reduce::{fingerprint, scale, sum_of_squares};
use lora_ops::transfer::to_vec;
use lora_spec::{MicroBatch, Optim};

use crate::TrainError;
use crate::moments::Moments;
use crate::process_group::{Partition, ProcessGroup};

/// The sum of the weighted losses of a micro-batch, and the sum of the weights.
pub type LossSums = (f64, f64);

/// Number of micro-batches that the host may be ahead of a GPU.
const MAX_MICRO_BATCHES_AHEAD: usize = 2;

/// An adapter that is trained over a frozen base, with its optimizer.
pub struct Engine {
    base: Arc<Base>,
    adapter: Adapter,
    pub(crate) moments: Moments,
    /// AdamW's `t`: number of optimizer steps so far.
    pub(crate) updates: u64,
    accumulator: TreeAccumulator<Gradients>,
    /// Micro-batches of the step that this rank computes.
    range: Range<usize>,
    losses: Vec<Loss>,
    in_flight: VecDeque<StreamEvent>,
    /// Sum of all ranks' gradients.
    reduced: Gradients,
}

impl Engine {
    /// Creates an engine before its first step, on the device of the base.
    pub fn new(base: Arc<Base>, adapter: Adapter, optim: Optim) -> Result<Self, TrainError> {
        let adapter = adapter.to_device_of(&base)?;
        Ok(Self {
            reduced: Gradients::zeros(adapter.layout(), base.device())?,
            accumulator: TreeAccumulator::new(),
            range: 0..0,
            losses: Vec::new(),
            in_flight: VecDeque::new(),
            moments: Moments::zeros(optim, adapter.layout(), base.device())?,
            updates: 0,
            base,
            adapter,
        })
    }

    /// Returns the frozen base.
    pub fn base(&self) -> &Arc<Base> {
        &self.base
    }

    /// Returns the adapter in its current state.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Replaces the parameters and moments. `params` is in the adapter's layout; for `initial` see
    /// [`Adapter::with_params`]; `find` returns each tensor of the moments by its name. On an error
    /// nothing changes.
    pub(crate) fn set_state(
        &mut self,
        params: Vec<f32>,
        initial: Option<Vec<f32>>,
        find: impl FnMut(&str) -> lora_ops::Result<Tensor>,
        updates: u64,
    ) -> Result<(), TrainError> {
        let moments = self.moments.read(self.adapter.layout(), self.base.device(), find)?;
        let adapter = self.adapter.with_params(params, initial)?;
        (self.adapter, self.moments, self.updates) = (adapter, moments, updates);
        Ok(())
    }

    /// Begins a step. This rank computes the micro-batches `range`.
    pub fn begin_step(&mut self, partition: Partition, range: Range<usize>) -> Result<(), TrainError> {
        self.losses.clear();
        self.range = range.clone();
        Ok(self.accumulator.start(partition.leaves, range)?)
    }

    /// Computes the step's next micro-batch and accumulates its unnormalized gradients. If
    /// `process_group` supports it, the reduction over all ranks begins during the backward pass of
    /// the last micro-batch.
    pub fn forward_backward(
        &mut self,
        batch: &MicroBatch,
        pass: PassOptions,
        partition: Partition,
        process_group: &mut ProcessGroup,
    ) -> Result<(), TrainError> {
        let leaf = match self.accumulator.free() {
            Some(used) => used,
            None => Gradients::zeros(self.adapter.layout(), self.base.device())?,
        };
        leaf.clear()?;
        let (loss, mut backward) = Backward::forward(&self.base, &self.adapter, batch, pass)?;
        self.losses.push(loss);
        let is_last = self.losses.len() == self.range.len();
        if is_last && process_group.overlaps_reduction() {
            let ids = nodes_in(partition.leaves, &self.range)?;
            while let Some(layer) = backward.next_block(&leaf)? {
                let part = self.adapter.layout().block(layer);
                if !part.is_empty() {
                    let nodes = self.merge_block(&ids, &leaf, part.clone())?;
                    let out = self.reduced.flat().narrow(0, part.start, part.len())?;
                    process_group.begin_block_reduction(partition, &nodes, &out)?;
                }
            }
            // `merge_block` has added the leaf to the sums, block by block.
            self.accumulator.push(leaf, |_, _| Ok::<_, TrainError>(()))?;
        } else {
            while backward.next_block(&leaf)?.is_some() {}
            self.accumulator
                .push(leaf, |sum, leaf| Ok::<_, TrainError>(add_assign(sum.flat(), leaf.flat())?))?;
        }
        self.in_flight.extend(StreamEvent::record(self.base.device())?);
        if self.in_flight.len() > MAX_MICRO_BATCHES_AHEAD
            && let Some(event) = self.in_flight.pop_front()
        {
            event.wait()?;
        }
        Ok(())
    }

    /// Takes part in the reduction that [`Self::forward_backward`] begins at the end of a rank's
    /// range, for a rank without micro-batches in the step.
    pub(crate) fn reduce_empty_range(
        &mut self,
        partition: Partition,
        process_group: &mut ProcessGroup,
    ) -> Result<(), TrainError> {
        if !process_group.overlaps_reduction() {
            return Ok(());
        }
        let layout = self.adapter.layout();
        for layer in (0..self.base.config.num_hidden_layers).rev() {
            let part = layout.block(layer);
            if !part.is_empty() {
                let out = self.reduced.flat().narrow(0, part.start, part.len())?;
                process_group.begin_block_reduction(partition, &[], &out)?;
            }
        }
        Ok(())
    }

    /// Adds the range `part` of the last leaf's gradients to the sums that contain this leaf.
    /// Returns the range `part` of the rank's nodes `ids`.
    fn merge_block(
        &self,
        ids: &[NodeId],
        leaf: &Gradients,
        part: Range<usize>,
    ) -> Result<Vec<(NodeId, Tensor)>, TrainError> {
        let cut = |gradients: &Gradients| gradients.flat().narrow(0, part.start, part.len());
        let mut newest = cut(leaf)?;
        let mut pending = self.accumulator.pending();
        for sum in pending.by_ref().take(self.accumulator.merges()) {
            let sum = cut(sum)?;
            add_assign(&sum, &newest)?;
            newest = sum;
        }
        let mut nodes = vec![newest];
        for sum in pending {
            nodes.push(cut(sum)?);
        }
        nodes.reverse();
        Ok(ids.iter().copied().zip(nodes).collect())
    }

    /// Waits for the losses of the step's micro-batches so far, and returns them in order.
    pub fn losses(&mut self) -> Result<Vec<LossSums>, TrainError> {
        self.in_flight.clear();
        Ok(self
            .losses
            .drain(..)
            .map(|loss| Ok((loss.sum()?, loss.weight_sum)))
            .collect::<lora_ops::Result<_>>()?)
    }

    /// Returns which of this rank's losses or gradients is not finite, if any.
    pub(crate) fn first_not_finite(&self, losses: &[LossSums]) -> Result<Option<String>, TrainError> {
        if losses.iter().any(|(loss, _)| !loss.is_finite()) {
            return Ok(Some("the loss".into()));
        }
        for node in self.accumulator.pending() {
            if !sum_of_squares(node.flat())?.is_finite() {
                let values: Vec<f32> = to_vec(node.flat())?;
                let at = values.iter().position(|g| !g.is_finite());
                let name = |at| format!("the gradient of {}", self.adapter.layout().name_of(at));
                return Ok(Some(at.map_or("the norm of a gradient".into(), name)));
            }
        }
        Ok(None)
    }

    /// Sums the gradients of all ranks and divides them by `weight_sum`. Returns the 2-norm of the
    /// mean gradient. If `weight_sum` is `None`, the step is skipped: the sum is not used, and the
    /// result is `None`.
    pub fn reduce(
        &mut self,
        process_group: &mut ProcessGroup,
        partition: Partition,
        weight_sum: Option<f64>,
    ) -> Result<Option<f64>, TrainError> {
        let mut nodes = self.accumulator.finish()?;
        process_group.finish_reductions()?;
        if weight_sum.is_some() && !process_group.overlaps_reduction() {
            match &mut nodes[..] {
                // In a group of one, this rank's sum is the result.
                [(_, sum)] if process_group.world_size() == 1 => std::mem::swap(sum, &mut self.reduced),
                nodes => {
                    let nodes: Vec<(NodeId, &Tensor)> =
                        nodes.iter().map(|(id, sum)| (*id, sum.flat())).collect();
                    process_group.reduce(partition, &nodes, self.reduced.flat())?;
                }
            }
        }
        self.accumulator.recycle(nodes);
        let Some(weight_sum) = weight_sum else { return Ok(None) };
        scale(self.reduced.flat(), (1.0 / weight_sum) as f32)?;
        Ok(Some(sum_of_squares(self.reduced.flat())?.sqrt()))
    }

    /// Updates the parameters with AdamW. The reduced gradient, which has the norm `grad_norm`, is
    /// clipped to `max_grad_norm` (0: not clipped).
    pub fn optim_step(&mut self, adamw: AdamW, grad_norm: f64, max_grad_norm: f64) -> Result<(), TrainError> {
        let factor = clip_factor(grad_norm, max_grad_norm);
        let (params, gradient) = (self.adapter.params(), self.reduced.flat());
        self.moments.step(adamw, self.updates + 1, params, gradient, factor)?;
        self.updates += 1;
        Ok(self.adapter.refresh()?)
    }

    /// Returns the loss of a micro-batch with the current adapter, without dropout.
    pub fn eval(&self, batch: &MicroBatch) -> Result<LossSums, TrainError> {
        let loss = loss(&self.base, Some(&self.adapter), batch)?;
        Ok((loss.sum()?, loss.weight_sum))
    }

    /// Returns the hash of the parameters, the initial term and the moments: 128 bits in
    /// hexadecimal.
    pub fn state_hash(&self) -> Result<String, TrainError> {
        let moments = self.moments.tensors().into_iter().map(|(_, tensor)| tensor);
        let adapter = std::iter::once(self.adapter.params()).chain(self.adapter.initial());
        let parts: Vec<&Tensor> = adapter.chain(moments).collect();
        let [low, high] = fingerprint(&parts)?;
        Ok(format!("{high:016x}{low:016x}"))
    }
}
