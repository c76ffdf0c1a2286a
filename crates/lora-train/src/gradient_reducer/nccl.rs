//! The sum between GPUs over NCCL. It runs block by block on a stream of its own, while the next
//! block is computed.

use candle_core::Tensor;
use lora_collective::tree::NodeId;
use lora_collective::{Group, NcclGroup};
use lora_ops::device::gpu_address;

use super::{GradientReducer, GradientSums};
use crate::error::TrainError;

/// Sums the gradients of all ranks on their GPUs.
pub(crate) struct NcclReducer(pub(crate) NcclGroup);

impl GradientReducer for NcclReducer {
    fn block_ready(&mut self, group: &mut Group, block: &GradientSums) -> Result<(), TrainError> {
        let GradientSums { partition, nodes, out } = block;
        let nodes: Vec<(NodeId, u64)> = nodes
            .iter()
            .map(|(id, node)| Ok((*id, gpu_address(node)?)))
            .collect::<Result<_, TrainError>>()?;
        let (address, elements) = (gpu_address(out)?, out.elem_count());
        Ok(self.0.all_reduce(group, partition.leaves, &partition.ranges, &nodes, address, elements)?)
    }

    fn finish(&mut self, group: &mut Group, all: &GradientSums) -> Result<Tensor, TrainError> {
        self.0.finish(group)?;
        Ok(all.out.clone())
    }

    fn discard(&mut self, group: &mut Group) -> Result<(), TrainError> {
        Ok(self.0.finish(group)?)
    }

    fn bytes_sent(&self) -> u64 {
        self.0.bytes_sent()
    }

    fn leave(self: Box<Self>) -> Result<(), TrainError> {
        Ok(self.0.leave()?)
    }
}
