//! The first part of a step: the micro-batches of one rank.

use std::collections::VecDeque;
use std::ops::Range;

use candle_core::Tensor;
use lora_collective::tree::{NodeId, TreeError, nodes_in};
use lora_model::{Backward, Gradients, Loss, PassOptions};
use lora_ops::add_assign;
use lora_ops::device::StreamEvent;
use lora_spec::MicroBatch;

use super::{AccumulatedGradients, Engine};
use crate::error::TrainError;
use crate::gradient_reducer::GradientSums;
use crate::partition::Partition;
use crate::process_group::ProcessGroup;

/// Number of micro-batches that the host may be ahead of a GPU, so that a cancellation takes effect
/// soon.
const MAX_MICRO_BATCHES_AHEAD: usize = 2;

/// A step whose micro-batches are being computed on this rank. Their gradients are not normalized.
pub struct GradientAccumulation<'a> {
    engine: &'a mut Engine,
    partition: Partition,
    /// Micro-batches of the step that this rank computes.
    range: Range<usize>,
    losses: Vec<Loss>,
    in_flight: VecDeque<StreamEvent>,
}

impl<'a> GradientAccumulation<'a> {
    /// Begins a step with this rank's micro-batches of `partition`. A rank without micro-batches
    /// has nothing to compute: its part in the reduction begins here.
    pub fn begin(
        engine: &'a mut Engine,
        partition: Partition,
        process_group: &mut ProcessGroup,
    ) -> Result<Self, TrainError> {
        let range = partition.range(process_group.rank());
        engine.accumulator.start(partition.leaves, range.clone())?;
        let step = Self { engine, partition, range, losses: Vec::new(), in_flight: VecDeque::new() };
        if step.range.is_empty() {
            for layer in (0..step.engine.base.config.layers.len()).rev() {
                step.block_ready(layer, process_group, |_| Ok(Vec::new()))?;
            }
        }
        Ok(step)
    }

    /// Computes the step's next micro-batch of this rank and adds its gradients to the sums. In the
    /// backward pass of the last one, each block's sums go to the reduction as soon as they are
    /// complete.
    pub fn forward_backward(
        &mut self,
        batch: &MicroBatch,
        pass: PassOptions,
        process_group: &mut ProcessGroup,
    ) -> Result<(), TrainError> {
        let leaf = self.engine.accumulator.free();
        let engine = &*self.engine;
        let leaf = match leaf {
            Some(used) => used,
            None => Gradients::zeros(engine.adapter.layout(), engine.base.device())?,
        };
        leaf.clear()?;
        let (loss, mut backward) = Backward::forward(&engine.base, &engine.adapter, batch, pass)?;
        self.losses.push(loss);
        if self.losses.len() < self.range.len() {
            while backward.next_block(&leaf)?.is_some() {}
            drop(backward);
            let add = |sum: &mut Gradients, leaf: &Gradients| add_assign(sum.flat(), leaf.flat());
            self.engine.accumulator.push(leaf, |sum, leaf| Ok::<_, TrainError>(add(sum, leaf)?))?;
        } else {
            let ids = nodes_in(self.partition.leaves, &self.range)?;
            while let Some(layer) = backward.next_block(&leaf)? {
                self.block_ready(layer, process_group, |part| self.merge_last_leaf(&ids, &leaf, part))?;
            }
            drop(backward);
            // `merge_last_leaf` has added the leaf to the sums, block by block.
            self.engine.accumulator.push(leaf, |_, _| Ok::<_, TrainError>(()))?;
        }
        self.in_flight.extend(StreamEvent::record(self.engine.base.device())?);
        if self.in_flight.len() > MAX_MICRO_BATCHES_AHEAD
            && let Some(event) = self.in_flight.pop_front()
        {
            event.wait()?;
        }
        Ok(())
    }

    /// Waits for the losses of this rank's micro-batches.
    ///
    /// # Errors
    /// [`TrainError::Tree`] if micro-batches are missing.
    pub fn finish(self) -> Result<AccumulatedGradients<'a>, TrainError> {
        let Self { engine, partition, range, losses, .. } = self;
        if losses.len() != range.len() {
            return Err(TreeError::Count { range, got: losses.len() }.into());
        }
        let losses = losses.iter().map(|loss| Ok((loss.sum()?, loss.weight_sum)));
        let losses = losses.collect::<lora_ops::Result<_>>()?;
        Ok(AccumulatedGradients { engine, partition, losses })
    }

    /// Passes the sums of a block to the reduction. `nodes` returns this rank's nodes, cut to the
    /// block's range of the gradients. A block without trained matrices has no gradients.
    fn block_ready(
        &self,
        layer: usize,
        process_group: &mut ProcessGroup,
        nodes: impl FnOnce(Range<usize>) -> Result<Vec<(NodeId, Tensor)>, TrainError>,
    ) -> Result<(), TrainError> {
        let part = self.engine.adapter.layout().block(layer);
        if part.is_empty() {
            return Ok(());
        }
        let out = self.engine.sum_buffer.narrow(0, part.start, part.len())?;
        let nodes = nodes(part)?;
        process_group.block_ready(&GradientSums { partition: &self.partition, nodes: &nodes, out: &out })
    }

    /// Adds the range `part` of the last leaf's gradients to the sums that contain this leaf.
    /// Returns the range `part` of the rank's nodes `ids`.
    fn merge_last_leaf(
        &self,
        ids: &[NodeId],
        leaf: &Gradients,
        part: Range<usize>,
    ) -> Result<Vec<(NodeId, Tensor)>, TrainError> {
        let cut = |gradients: &Gradients| gradients.flat().narrow(0, part.start, part.len());
        let accumulator = &self.engine.accumulator;
        let mut newest = cut(leaf)?;
        let mut pending = accumulator.pending();
        for sum in pending.by_ref().take(accumulator.merges()) {
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
}
