//! The operations of the all-reduce, enqueued with NCCL and on the group's stream.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaStream, result};
use cudarc::nccl::sys::{self, ncclDataType_t::ncclFloat32};

use super::communicator::{Communicator, check_result};
use super::wait::wait;
use super::{ALL_REDUCE_ACTION, failed};
use crate::error::CollectiveError;
use crate::group::Group;
use crate::segmented_all_reduce::{PeerBuffer, Transport};

pub(super) struct NcclTransport<'a> {
    pub(super) group: &'a mut Group,
    pub(super) communicator: &'a Communicator,
    pub(super) stream: &'a Arc<CudaStream>,
    pub(super) timeout: Duration,
    /// Bytes sent so far.
    pub(super) sent: &'a mut u64,
}

impl Transport for NcclTransport<'_> {
    type Error = CollectiveError;

    /// Returns once NCCL has handed the exchange to the GPU. If NCCL is not yet connected with a
    /// peer, this waits for the peer.
    fn exchange(&mut self, sends: &[PeerBuffer], receives: &[PeerBuffer]) -> Result<(), CollectiveError> {
        let (communicator, stream) = (self.communicator.raw(), self.stream.cu_stream().cast());
        let receive = |part: &PeerBuffer| {
            let (to, peer) = (part.address as *mut _, part.peer as i32);
            // SAFETY: the caller of the all-reduce guarantees that the memory is valid.
            unsafe { sys::ncclRecv(to, part.elements, ncclFloat32, peer, communicator, stream) }
        };
        let send = |part: &PeerBuffer| {
            let (from, peer) = (part.address as *const _, part.peer as i32);
            // SAFETY: as above.
            unsafe { sys::ncclSend(from, part.elements, ncclFloat32, peer, communicator, stream) }
        };
        // SAFETY: every group start is followed by a group end on this thread.
        check_result(ALL_REDUCE_ACTION, unsafe { sys::ncclGroupStart() })?;
        let mut asked = receives.iter().map(receive).chain(sends.iter().map(send));
        let asked = asked.try_for_each(|result| check_result(ALL_REDUCE_ACTION, result).map(drop));
        let ended = check_result(ALL_REDUCE_ACTION, unsafe { sys::ncclGroupEnd() });
        asked.and(ended)?;
        *self.sent += sends.iter().map(|part| 4 * part.elements as u64).sum::<u64>();
        wait(self.group, ALL_REDUCE_ACTION, self.timeout, || self.communicator.is_ready(ALL_REDUCE_ACTION))
    }

    fn copy(&mut self, from: u64, to: u64, elements: usize) -> Result<(), CollectiveError> {
        let bytes = elements * size_of::<f32>();
        // SAFETY: as above.
        let copied = unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) };
        copied.map_err(failed(ALL_REDUCE_ACTION))
    }

    fn combine(
        &mut self,
        order: &[(usize, usize)],
        vectors: u64,
        elements: usize,
    ) -> Result<(), CollectiveError> {
        lora_ops::reduce::tree_combine(self.stream, order, vectors, elements)
            .map_err(failed(ALL_REDUCE_ACTION))
    }
}
