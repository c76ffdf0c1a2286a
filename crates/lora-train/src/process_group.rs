//! The other ranks, and the sum of all ranks' gradients.
//!
//! The sum is the same, bit for bit, whichever way it takes: over TCP when all gradients are there, or, between GPUs, through
//! NCCL block by block, on a stream of its own while the next block is computed.

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

/// How long NCCL may take to connect the ranks.
#[cfg(feature = "cuda")]
const NCCL_CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(45);

/// The ranks of the job's present group.
pub struct ProcessGroup {
    group: Group,
    #[cfg(feature = "cuda")]
    nccl: Option<NcclGroup>,
    /// See [`Self::fallback`].
    fallback: Option<String>,
}

/// Which micro-batches of a step each rank computes.
#[derive(Debug, Clone, Copy)]
pub struct Partition<'a> {
    /// Micro-batches of the step.
    pub leaves: usize,
    /// Those of each rank, by rank.
    pub ranges: &'a [Range<usize>],
}

impl ProcessGroup {
    /// No others.
    pub fn single() -> Self {
        Self {
            group: Group::single(),
            #[cfg(feature = "cuda")]
            nccl: None,
            fallback: None,
        }
    }

    /// The ranks of `group`, whose gradients are on `device`.
    pub fn new(group: Group, preference: &Preference, device: &Device) -> Result<Self, TrainError> {
        #[cfg(feature = "cuda")]
        {
            Self::with_nccl(group, preference, device)
        }
        #[cfg(not(feature = "cuda"))]
        match (preference.collective, device) {
            (Collective::Nccl, _) => {
                let message = "collective nccl: this build has no CUDA; auto and tcp work in it".to_owned();
                Err(CollectiveError::Argument(message).into())
            }
            _ => Ok(Self { group, fallback: None }),
        }
    }

    /// Reason why the gradients travel over TCP although the group's machines have several GPUs, and
    /// what would be right. `None` if NCCL carries them or TCP is intended.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// With NCCL's group of the ranks, where all can use NCCL and none objects.
    #[cfg(feature = "cuda")]
    fn with_nccl(mut group: Group, preference: &Preference, device: &Device) -> Result<Self, TrainError> {
        let without = |group, fallback| Ok(Self { group, nccl: None, fallback });
        if group.world_size() == 1 {
            return without(group, None);
        }
        // The ranks of a group have one kind of device.
        let Some((gpu, stream)) = lora_ops::cuda::uuid(device)?.zip(lora_ops::cuda::stream(device)?) else {
            return match preference.collective {
                Collective::Nccl => {
                    Err(CollectiveError::Argument("collective nccl: the device is a CPU".to_owned()).into())
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
    /// NCCL does not come to an end: the device is lost.
    pub(crate) fn leave(self) -> Result<(), TrainError> {
        #[cfg(feature = "cuda")]
        if let Some(nccl) = self.nccl {
            // First, so that peers see that this rank goes.
            drop(self.group);
            nccl.leave()?;
        }
        Ok(())
    }

    /// The connections of the group.
    pub(crate) fn group(&mut self) -> &mut Group {
        &mut self.group
    }

    /// This rank.
    pub(crate) fn rank(&self) -> usize {
        self.group.rank()
    }

    /// The number of ranks.
    pub(crate) fn world_size(&self) -> usize {
        self.group.world_size()
    }

    /// Bytes sent to all peers since the group was formed.
    pub(crate) fn bytes_sent(&self) -> u64 {
        #[cfg(feature = "cuda")]
        let through_nccl = self.nccl.as_ref().map_or(0, NcclGroup::bytes_sent);
        #[cfg(not(feature = "cuda"))]
        let through_nccl = 0;
        self.group.bytes_sent() + through_nccl
    }

    /// Fails where the run was cancelled.
    pub(crate) fn check_cancelled(&self) -> Result<(), TrainError> {
        if self.group.cancel_token().is_cancelled() { Err(TrainError::Cancelled) } else { Ok(()) }
    }

    /// Whether the sum of a block's gradients is begun as soon as they are there ([`Self::begin_block_reduction`]); else all are summed
    /// at the end ([`Self::reduce`]).
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

    /// Begins the sum of a part of all ranks' gradients: `nodes` and `out` are that part of this rank's sums and of the result.
    /// All ranks must begin the same parts in the same order.
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

    /// Waits for the sums that were begun.
    pub(crate) fn finish_reductions(&mut self) -> Result<(), TrainError> {
        #[cfg(feature = "cuda")]
        if let Some(nccl) = &mut self.nccl {
            nccl.finish(&mut self.group)?;
        }
        Ok(())
    }

    /// Sums all ranks' gradients into `out`, over TCP.
    pub(crate) fn reduce(
        &mut self,
        partition: Partition,
        nodes: &[(NodeId, &Tensor)],
        out: &Tensor,
    ) -> Result<(), TrainError> {
        let host = nodes.iter().map(|(id, node)| Ok((*id, to_vec(node)?)));
        let host = host.collect::<Result<Vec<(NodeId, Vec<f32>)>, TrainError>>()?;
        let nodes: Vec<(NodeId, &[f32])> = host.iter().map(|(id, node)| (*id, node.as_slice())).collect();
        let mut sums = vec![0.0; out.elem_count()];
        self.group.all_reduce_tree(partition.leaves, partition.ranges, &nodes, &mut sums)?;
        Ok(write_f32(out, &sums)?)
    }
}
