//! The process group: the connections to the other ranks, and how their gradients are summed.

use std::time::Duration;

use candle_core::{Device, Tensor};
use lora_collective::backend_choice::{CollectiveBackend, Preference};
use lora_collective::{Group, NcclGroup};
use lora_ops::device::gpu_properties;

use crate::error::TrainError;
use crate::gradient_reducer::{GradientReducer, GradientSums, NcclReducer, SingleRankReducer, TcpReducer};

/// The time limit for connecting the ranks with NCCL.
const NCCL_CONNECT_TIMEOUT: Duration = Duration::from_secs(45);

/// The ranks of the job's current group.
pub struct ProcessGroup {
    // The group closes first, so that the peers detect that this rank leaves.
    group: Group,
    reducer: Box<dyn GradientReducer>,
    backend: CollectiveBackend,
}

impl ProcessGroup {
    /// Creates a group of one rank.
    pub fn single() -> Self {
        Self { group: Group::single(), reducer: Box::new(SingleRankReducer), backend: CollectiveBackend::Tcp }
    }

    /// Creates the process group of `group`, whose ranks have their gradients on `device`. The
    /// ranks agree on NCCL or TCP according to the preferences of all ranks.
    ///
    /// # Errors
    /// A rank requires NCCL, which cannot be used; a peer failed; or the group was cancelled.
    pub fn new(mut group: Group, preference: &Preference, device: &Device) -> Result<Self, TrainError> {
        let gpu = gpu_properties(device)?;
        let backend = NcclGroup::agree(&mut group, preference, gpu.as_ref().map(|gpu| gpu.uuid.as_str()))?;
        let reducer: Box<dyn GradientReducer> = match (&backend, gpu) {
            _ if group.world_size() == 1 => Box::new(SingleRankReducer),
            (CollectiveBackend::Nccl, Some(gpu)) => {
                let nccl = NcclGroup::form(&mut group, gpu.ordinal, NCCL_CONNECT_TIMEOUT)?;
                Box::new(NcclReducer(nccl))
            }
            (CollectiveBackend::Nccl | CollectiveBackend::Tcp | CollectiveBackend::Fallback(_), _) => {
                Box::new(TcpReducer)
            }
        };
        Ok(Self { group, reducer, backend })
    }

    /// Returns how the gradients are sent.
    pub(crate) fn backend(&self) -> &CollectiveBackend {
        &self.backend
    }

    /// Returns why the gradients are sent over TCP although the group's machines have several GPUs,
    /// and the remedy. `None` if NCCL sends them or TCP is intended.
    pub fn fallback(&self) -> Option<&str> {
        match &self.backend {
            CollectiveBackend::Fallback(reason) => Some(reason),
            CollectiveBackend::Nccl | CollectiveBackend::Tcp => None,
        }
    }

    /// Leaves the group.
    ///
    /// # Errors
    /// The NCCL communicator cannot be aborted: the device is lost.
    pub(crate) fn leave(self) -> Result<(), TrainError> {
        drop(self.group);
        self.reducer.leave()
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
        self.group.bytes_sent() + self.reducer.bytes_sent()
    }

    /// Returns [`TrainError::Cancelled`] if the run was cancelled.
    pub(crate) fn check_cancelled(&self) -> Result<(), TrainError> {
        if self.group.cancel_token().is_cancelled() { Err(TrainError::Cancelled) } else { Ok(()) }
    }

    /// See [`GradientReducer::block_ready`].
    pub(crate) fn block_ready(&mut self, block: &GradientSums) -> Result<(), TrainError> {
        self.reducer.block_ready(&mut self.group, block)
    }

    /// See [`GradientReducer::finish`].
    pub(crate) fn finish_reduction(&mut self, all: &GradientSums) -> Result<Tensor, TrainError> {
        self.reducer.finish(&mut self.group, all)
    }

    /// See [`GradientReducer::discard`].
    pub(crate) fn discard_reduction(&mut self) -> Result<(), TrainError> {
        self.reducer.discard(&mut self.group)
    }
}
