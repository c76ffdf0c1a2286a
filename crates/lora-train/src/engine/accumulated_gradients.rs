//! The second part of a step: the reduction over all ranks.

use candle_core::Tensor;
use lora_collective::tree::NodeId;
use lora_ops::reduce::{scale, sum_of_squares};
use lora_ops::transfer::to_vec;

use super::{Engine, LossSums, ReducedGradients};
use crate::error::TrainError;
use crate::gradient_reducer::GradientSums;
use crate::partition::Partition;
use crate::process_group::ProcessGroup;

/// A step whose micro-batches of this rank are computed.
pub struct AccumulatedGradients<'a> {
    pub(super) engine: &'a mut Engine,
    pub(super) partition: Partition,
    pub(super) losses: Vec<LossSums>,
}

impl<'a> AccumulatedGradients<'a> {
    /// Returns the losses of this rank's micro-batches, in order.
    pub fn losses(&self) -> &[LossSums] {
        &self.losses
    }

    /// Returns which of this rank's losses or gradients is not finite, if any.
    pub(crate) fn first_not_finite(&self) -> Result<Option<String>, TrainError> {
        if self.losses.iter().any(|(loss, _)| !loss.is_finite()) {
            return Ok(Some("the loss".into()));
        }
        for node in self.engine.accumulator.pending() {
            if !sum_of_squares(node.flat())?.is_finite() {
                let values: Vec<f32> = to_vec(node.flat())?;
                let at = values.iter().position(|g| !g.is_finite());
                let name = |at| format!("the gradient of {}", self.engine.adapter.layout().name_of(at));
                return Ok(Some(at.map_or("the norm of a gradient".into(), name)));
            }
        }
        Ok(None)
    }

    /// Sums the gradients of all ranks and divides them by `weight_sum`.
    pub fn reduce(
        self,
        process_group: &mut ProcessGroup,
        weight_sum: f64,
    ) -> Result<ReducedGradients<'a>, TrainError> {
        let Self { engine, partition, .. } = self;
        let sums = engine.accumulator.finish()?;
        let nodes: Vec<(NodeId, Tensor)> = sums.iter().map(|(id, sum)| (*id, sum.flat().clone())).collect();
        let all = GradientSums { partition: &partition, nodes: &nodes, out: &engine.sum_buffer };
        let reduced = process_group.finish_reduction(&all);
        // The result may be in the memory of a node, which no other step uses while `engine` is
        // borrowed.
        engine.accumulator.recycle(sums);
        let gradient = reduced?;
        scale(&gradient, (1.0 / weight_sum) as f32)?;
        let norm = sum_of_squares(&gradient)?.sqrt();
        Ok(ReducedGradients { engine, gradient, norm })
    }

    /// Ends the step without an update, because a rank's gradients are not finite.
    pub fn discard(self, process_group: &mut ProcessGroup) -> Result<(), TrainError> {
        process_group.discard_reduction()
    }
}
