//! The process group: the connections to the other ranks, and the sum of all ranks' gradients.
//!
//! The sum has the same bits over TCP and over NCCL. Over TCP it begins when all gradients are
//! computed. Between GPUs, NCCL sums the gradients block by block on its own stream, while the next
//! block is computed.

use std::ops::Range;

use candle_core::{Device, Tensor};
#[cfg(feature = "cuda")]
use lora_collective::NcclGroup;
#[cfg(feature = "cuda")]
use lora_collective::backend_choice::CollectiveBackend;
use lora_collective::backend_choice::{Collective, Preference};
use lora_collective::tree::NodeId;
use lora_collective::{CollectiveError, Group};
use lora_ops::device::write_f32;
use lora_ops::transfer::to_vec;

use crate::TrainError;

/// The time limit for connecting the ranks with NCCL.
#[cfg(feature = "cuda")]
const NCCL_CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(45);

/// The ranks of the job's current group.
pub struct ProcessGroup {
    group: Group,
    #[cfg(feature = "cuda")]
    nccl: Option<NcclGroup>,
    /// See [`Self::fallback`].
    fallback: Option<String>,
}

/// The division of a step's micro-batches among the ranks.
#[derive(Debug, Clone, Copy)]
pub struct Partition<'a> {
    /// Number of micro-batches of the step.
    pub leaves: usize,
    /// The micro-batches of each rank, by rank.
    pub ranges: &'a [Range<usize>],
}

impl ProcessGroup {
    /// Creates a group of one rank.
    pub fn single() -> Self {
        Self {
            group: Group::single(),
            #[cfg(feature = "cuda")]
            nccl: None,
            fallback: None,
        }
    }

    /// Creates the process group of `group`, whose ranks have their gradients on `device`. The
    /// ranks agree on NCCL or TCP according to the preferences of all ranks.
    ///
    /// # Errors
    /// A rank requires NCCL, which cannot be used; a peer failed; or the group was cancelled.
    pub fn new(group: Group, preference: &Preference, device: &Device) -> Result<Self, TrainError> {
        #[cfg(feature = "cuda")]
        {
            Self::with_nccl(group, preference, device)
        }
        #[cfg(not(feature = "cuda"))]
        match (preference.collective, device) {
            (Collective::Nccl, _) => {
                let message = "collective nccl: this build has no CUDA; use auto or tcp".to_owned();
                Err(CollectiveError::Argument(message).into())
            }
            _ => Ok(Self { group, fallback: None }),
        }
    }

    /// Returns why the gradients are sent over TCP although the group's machines have several GPUs,
    /// and the remedy. `None` if NCCL sends them or TCP is intended.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// Connects the ranks with NCCL if they agree on it.
    #[cfg(feature = "cuda")]
    fn with_nccl(mut group: Group, preference: &Preference, device: &Device) -> Result<Self, TrainError> {
        let without = |group, fallback| Ok(Self { group, nccl: None, fallback });
        if group.world_size() == 1 {
            return without(group, None);
        }
        // All ranks of a group have the same kind of device.
        let Some((gpu, stream)) = lora_ops::cuda::uuid(device)?.zip(lora_ops::cuda::stream(device)?) else {
            return match preference.collective {
                Collective::Nccl => {
                    let message = "collective nccl: the device is a CPU; use auto or tcp".to_owned();
                    Err(CollectiveError::Argument(message).into())
                }
                Collective::Auto | Collective::Tcp => without(group, None),
            };
        };
        match NcclGroup::agree(&mut group, preference, &gpu)? {
            CollectiveBackend::Tcp => without(group, None),
            CollectiveBackend::Fallback(reason) => without(group, Some(reason)),
            CollectiveBackend::Nccl => {
                let nccl = NcclGroup::form(&mut group, stream, NCCL_CONNECT_TIMEOUT)?;
                Ok(Self { group, nccl: Some(nccl), fallback: None })
            }
        }
    }

    /// Leaves the group.
    ///
    /// # Errors
    /// The NCCL communicator cannot be aborted: the device is lost.
    pub(crate) fn leave(self) -> Result<(), TrainError> {
        #[cfg(feature = "cuda")]
        if let Some(nccl) = self.nccl {
            // The TCP group closes first, so that the peers detect that this rank leaves.
            drop(self.group);
            nccl.leave()?;
        }
        Ok(())
    }

    /// Returns the TCP connections of the group.
    pub(crate) fn group(&mut self) -> &mut Group {
        &mut self.group
    }

    /// Returns this rank.
    pub(crate) fn rank(&self) -> usize {
        self.group.rank()
    }

    /// Returns the number of ranks.
    pub(crate) fn world_size(&self) -> usize {
        self.group.world_size()
    }

    /// Returns the number of bytes sent to all peers since the group was formed.
    pub(crate) fn bytes_sent(&self) -> u64 {
        #[cfg(feature = "cuda")]
        let through_nccl = self.nccl.as_ref().map_or(0, NcclGroup::bytes_sent);
        #[cfg(not(feature = "cuda"))]
        let through_nccl = 0;
        self.group.bytes_sent() + through_nccl
    }

    /// Returns [`TrainError::Cancelled`] if the run was cancelled.
    pub(crate) fn check_cancelled(&self) -> Result<(), TrainError> {
        if self.group.cancel_token().is_cancelled() { Err(TrainError::Cancelled) } else { Ok(()) }
    }

    /// Returns whether the reduction of a block begins as soon as its gradients are computed
    /// ([`Self::begin_block_reduction`]). Otherwise all gradients are reduced at the end
    /// ([`Self::reduce`]).
    pub(crate) fn overlaps_reduction(&self) -> bool {
        #[cfg(feature = "cuda")]
        {
            self.nccl.is_some()
        }
        #[cfg(not(feature = "cuda"))]
        {
            false
        }
    }

    /// Begins to sum one part of all ranks' gradients. `nodes` has this part of this rank's sums,
    /// and `out` receives this part of the result. All ranks must begin the same parts in the same
    /// order.
    pub(crate) fn begin_block_reduction(
        &mut self,
        partition: Partition,
        nodes: &[(NodeId, Tensor)],
        out: &Tensor,
    ) -> Result<(), TrainError> {
        #[cfg(feature = "cuda")]
        if let Some(nccl) = &mut self.nccl {
            let address = lora_ops::cuda::address;
            let nodes = nodes
                .iter()
                .map(|(id, node)| Ok((*id, address(node)?)))
                .collect::<Result<Vec<_>, TrainError>>()?;
            let Partition { leaves, ranges } = partition;
            nccl.all_reduce(&mut self.group, leaves, ranges, &nodes, address(out)?, out.elem_count())?;
        }
        let _ = (partition, nodes, out);
        Ok(())
    }

    /// Waits for all reductions that have begun.
    pub(crate) fn finish_reductions(&mut self) -> Result<(), TrainError> {
        #[cfg(feature = "cuda")]
        if let Some(nccl) = &mut self.nccl {
            nccl.finish(&mut self.group)?;
        }
        Ok(())
    }

    /// Sums all ranks' gradients into `out` over TCP.
    pub(crate) fn reduce(
        &mut self,
        partition: Partition,
        nodes: &[(NodeId, &Tensor)],
        out: &Tensor,
    ) -> Result<(), TrainError> {
        let on_host = nodes.iter().map(|(id, node)| Ok((*id, to_vec(node)?)));
        let on_host = on_host.collect::<Result<Vec<(NodeId, Vec<f32>)>, TrainError>>()?;
        let nodes: Vec<(NodeId, &[f32])> = on_host.iter().map(|(id, node)| (*id, node.as_slice())).collect();
        let mut sums = vec![0.0; out.elem_count()];
        self.group.all_reduce_tree(partition.leaves, partition.ranges, &nodes, &mut sums)?;
        Ok(write_f32(out, &sums)?)
    }
}
