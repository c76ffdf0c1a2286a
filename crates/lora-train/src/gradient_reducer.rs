//! The sum of all ranks' gradients.

mod nccl;
mod single_rank;
mod tcp;

use candle_core::Tensor;
use lora_collective::Group;
use lora_collective::tree::NodeId;

pub(crate) use self::nccl::NcclReducer;
pub(crate) use self::single_rank::SingleRankReducer;
pub(crate) use self::tcp::TcpReducer;
use crate::error::TrainError;
use crate::partition::Partition;

/// One rank's sums of gradients and the place for the sum of all ranks: of one block, or of all
/// blocks. All tensors are f32 vectors of one length.
pub(crate) struct GradientSums<'a> {
    pub(crate) partition: &'a Partition,
    /// This rank's sums, one for each node of its micro-batches; empty if it has no micro-batches.
    pub(crate) nodes: &'a [(NodeId, Tensor)],
    /// A buffer for the sum over all micro-batches of the step.
    pub(crate) out: &'a Tensor,
}

/// Sums the gradients of all ranks. Every implementation computes the same bits.
///
/// In every step, all ranks call [`Self::block_ready`] for the same blocks in the same order, and
/// then [`Self::finish`] or [`Self::discard`]. By default, everything happens in `finish`.
pub(crate) trait GradientReducer: Send + Sync {
    /// Takes the sums of a block as soon as they are computed, so that their reduction can overlap
    /// with the backward pass of the next block. Their memory must stay valid, and must not change,
    /// until the step's reduction ends.
    fn block_ready(&mut self, _group: &mut Group, _block: &GradientSums) -> Result<(), TrainError> {
        Ok(())
    }

    /// Ends the reduction of a step. `all` has the whole vectors whose parts were passed to
    /// [`Self::block_ready`]. Returns the sum over all micro-batches, in the memory of `all`.
    fn finish(&mut self, group: &mut Group, all: &GradientSums) -> Result<Tensor, TrainError>;

    /// Ends the reduction of a step whose sum is not needed.
    fn discard(&mut self, _group: &mut Group) -> Result<(), TrainError> {
        Ok(())
    }

    /// Returns the number of bytes sent so far in addition to those of the group.
    fn bytes_sent(&self) -> u64 {
        0
    }

    /// Leaves the other ranks, after the group's connections were closed.
    ///
    /// # Errors
    /// The device is lost.
    fn leave(self: Box<Self>) -> Result<(), TrainError> {
        Ok(())
    }
}
