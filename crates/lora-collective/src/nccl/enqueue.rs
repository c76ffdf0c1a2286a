//! What the all-reduce is made of, asked of NCCL and of the group's stream.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaStream, result};
use cudarc::nccl::sys::{self, ncclDataType_t::ncclFloat32};

use super::communicator::{Communicator, outcome};
use super::watch::wait;
use super::{ALL_REDUCE, failed};
use crate::device::{Fabric, Part};
use crate::error::CollectiveError;
use crate::group::Group;

pub(super) struct Enqueue<'a> {
    pub(super) group: &'a mut Group,
    pub(super) communicator: &'a Communicator,
    pub(super) stream: &'a Arc<CudaStream>,
    pub(super) timeout: Duration,
    /// Bytes.
    pub(super) sent: &'a mut u64,
}

impl Fabric for Enqueue<'_> {
    type Error = CollectiveError;

    /// Returns once NCCL has handed it to the GPU: with a peer that it was not yet connected with, that waits for the
    /// peer.
    fn exchange(&mut self, sends: &[Part], receives: &[Part]) -> Result<(), CollectiveError> {
        let (communicator, stream) = (self.communicator.raw(), self.stream.cu_stream().cast());
        let receive = |part: &Part| {
            let (to, peer) = (part.address as *mut _, part.peer as i32);
            // SAFETY: the caller of the all-reduce answers for the memory.
            unsafe { sys::ncclRecv(to, part.elements, ncclFloat32, peer, communicator, stream) }
        };
        let send = |part: &Part| {
            let (from, peer) = (part.address as *const _, part.peer as i32);
            // SAFETY: as above.
            unsafe { sys::ncclSend(from, part.elements, ncclFloat32, peer, communicator, stream) }
        };
        // SAFETY: every start has its end, on this thread.
        outcome(ALL_REDUCE, unsafe { sys::ncclGroupStart() })?;
        let mut asked = receives.iter().map(receive).chain(sends.iter().map(send));
        let asked = asked.try_for_each(|result| outcome(ALL_REDUCE, result).map(drop));
        let ended = outcome(ALL_REDUCE, unsafe { sys::ncclGroupEnd() });
        asked.and(ended)?;
        *self.sent += sends.iter().map(|part| 4 * part.elements as u64).sum::<u64>();
        wait(self.group, ALL_REDUCE, self.timeout, || self.communicator.is_ready(ALL_REDUCE))
    }

    fn copy(&mut self, from: u64, to: u64, elements: usize) -> Result<(), CollectiveError> {
        let bytes = elements * size_of::<f32>();
        // SAFETY: as above.
        let copied = unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) };
        copied.map_err(failed(ALL_REDUCE))
    }

    fn combine(
        &mut self,
        order: &[(usize, usize)],
        vectors: u64,
        elements: usize,
    ) -> Result<(), CollectiveError> {
        lora_ops::cuda::tree_combine(self.stream, order, vectors, elements)
            .map_err(|error| CollectiveError::Device { action: ALL_REDUCE, message: error.to_string() })
    }
}
