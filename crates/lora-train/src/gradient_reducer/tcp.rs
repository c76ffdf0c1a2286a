//! The sum over TCP. It begins when all gradients are computed: a group's operations block, and a
//! step with a loss that is not finite then sends no gradients.

use candle_core::Tensor;
use lora_collective::Group;
use lora_collective::tree::NodeId;
use lora_ops::device::write_f32;
use lora_ops::transfer::to_vec;

use super::{GradientReducer, GradientSums};
use crate::error::TrainError;

/// Sums the gradients of all ranks on their hosts.
pub(crate) struct TcpReducer;

impl GradientReducer for TcpReducer {
    fn finish(&mut self, group: &mut Group, all: &GradientSums) -> Result<Tensor, TrainError> {
        let GradientSums { partition, nodes, out } = all;
        let on_host = nodes.iter().map(|(id, node)| Ok((*id, to_vec(node)?)));
        let on_host = on_host.collect::<Result<Vec<(NodeId, Vec<f32>)>, TrainError>>()?;
        let nodes: Vec<(NodeId, &[f32])> = on_host.iter().map(|(id, node)| (*id, node.as_slice())).collect();
        let mut sums = vec![0.0; out.elem_count()];
        group.all_reduce_tree(partition.leaves, &partition.ranges, &nodes, &mut sums)?;
        write_f32(out, &sums)?;
        Ok((*out).clone())
    }
}
