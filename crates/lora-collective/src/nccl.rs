//! The all-reduce between GPUs over NCCL.
//!
//! A [`Group`] stands behind every communicator: it carries NCCL's unique id, and it is watched wherever NCCL or a GPU is
//! waited for, so that a peer that dies, a cancelled group or a time that is up ends the wait. The communicator is
//! nonblocking, for NCCL's own waits know no end.

mod communicator;
mod transport;
mod wait;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, DriverError, result::stream};
use cudarc::nccl::sys;

use crate::backend_choice::{self, Capabilities, CollectiveBackend, Preference};
use crate::error::{CollectiveError, Operation, PeerFailure};
use crate::group::Group;
use crate::segmented_all_reduce::SegmentPlan;
use crate::tree::NodeId;
use communicator::Communicator;
use transport::NcclTransport;
use wait::{attribute_error, wait};

const FORM_ACTION: &str = "forming the group";
const ALL_REDUCE_ACTION: &str = "all-reduce";

/// Segments under way at a time. More wait on the CPU, where a wait can be ended: a stream that is full blocks the caller.
const MAX_UNDER_WAY: usize = 16;

/// Bytes of `NCCL_HOSTID` that NCCL looks at.
const HOST_ID_BYTES: usize = 1023;

/// How long [`NcclGroup::finish`] waits for the GPUs at most, where all ranks have begun what it waits for.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(120);

/// A communicator of NCCL beside a [`Group`], with a stream of its own. One thread owns it.
///
/// All ranks call the same methods in the same order with the same arguments, their own nodes and addresses aside. An
/// error stops what is under way and leaves the group of no further use, and this with it; so does dropping this before
/// [`Self::finish`].
pub struct NcclGroup {
    communicator: Communicator,
    compute: Arc<CudaStream>,
    stream: Arc<CudaStream>,
    timeout: Duration,
    /// Memory of the all-reduce, kept from call to call.
    scratch: Option<CudaSlice<f32>>,
    /// The end of each segment that was not yet seen to be done.
    under_way: VecDeque<CudaEvent>,
    sent: u64,
    /// What of NCCL could not be taken down, and may still use memory.
    is_leaked: bool,
}

impl NcclGroup {
    /// Whether the ranks of `group` use NCCL, by what each prefers and has (see
    /// [`backend_choice::choose`]); `gpu_uuid` tells this rank's GPU from others.
    ///
    /// # Errors
    /// As [`backend_choice::agree`].
    pub fn agree(
        group: &mut Group,
        preference: &Preference,
        gpu_uuid: &str,
    ) -> Result<CollectiveBackend, CollectiveError> {
        backend_choice::agree(group, &capabilities_of(preference, gpu_uuid))
    }

    /// Connects the GPUs of all ranks; this rank's is that of `compute`, the stream that the vectors are computed on.
    /// `timeout` is the limit of that; later waits, in which peers may still compute, have the group's.
    ///
    /// # Errors
    /// NCCL or CUDA fails, a failed peer, cancelled, or not done in time.
    pub fn form(
        group: &mut Group,
        compute: Arc<CudaStream>,
        timeout: Duration,
    ) -> Result<Self, CollectiveError> {
        let formed = Self::connect(group, compute, timeout);
        formed.map_err(|error| attribute_error(group, error))
    }

    /// Has one segment of the ranks' vectors summed over all leaves, after what is on the compute stream now. Returns as
    /// soon as that is asked of the GPU; the vectors are in use until [`Self::finish`].
    ///
    /// `nodes` are those of this rank, each with the address of the segment in its vector; `out`, where the sum goes, may
    /// be one of them. The bits are those of [`Group::all_reduce_tree`].
    ///
    /// # Errors
    /// As [`Self::form`], and ranges that are not a partition of the leaves, or nodes that are not those of this rank's.
    pub fn all_reduce(
        &mut self,
        group: &mut Group,
        leaves: usize,
        ranges: &[Range<usize>],
        nodes: &[(NodeId, u64)],
        out: u64,
        elements: usize,
    ) -> Result<(), CollectiveError> {
        let plan = SegmentPlan::new(leaves, ranges, group.rank(), elements);
        let enqueued = plan.and_then(|plan| self.enqueue(group, &plan, nodes, out));
        enqueued.map_err(|error| self.fail(group, error))
    }

    /// Waits until all segments are summed on all ranks, and lets the compute stream go on after that. It waits for GPUs,
    /// not for ranks that have yet to begin.
    ///
    /// # Errors
    /// As [`Self::form`]. The sums are then not to be used, whatever is there.
    pub fn finish(&mut self, group: &mut Group) -> Result<(), CollectiveError> {
        group.check_usable()?;
        let finished = self.wait_until_under_way(group, 0, self.timeout.min(TRANSFER_TIMEOUT));
        // A receive from a rank that aborts can end, on the GPU, as if all had come. Such a rank has left the group before, so
        // what counts is that all ranks have come here.
        let agreed = finished.and_then(|()| group.barrier());
        let joined = agreed.and_then(|()| self.compute.join(&self.stream).map_err(failed(ALL_REDUCE_ACTION)));
        joined.map_err(|error| self.fail(group, error))
    }

    /// Takes the communicator down.
    ///
    /// # Errors
    /// That is not possible: memory of the GPU may be in use for ever, and the process is of no further use.
    pub fn leave(mut self) -> Result<(), CollectiveError> {
        self.stop();
        match self.is_leaked {
            false => Ok(()),
            true => {
                let message = "a communicator cannot be taken down".to_owned();
                Err(CollectiveError::Device { action: "leaving the group", message })
            }
        }
    }

    /// Bytes sent to all peers so far.
    pub fn bytes_sent(&self) -> u64 {
        self.sent
    }

    fn connect(
        group: &mut Group,
        compute: Arc<CudaStream>,
        timeout: Duration,
    ) -> Result<Self, CollectiveError> {
        let id = share_id(group)?;
        let context = compute.context();
        let stream = context
            .bind_to_thread()
            .and_then(|()| stream::get_priority_range())
            .and_then(|(_, highest)| context.new_stream_with_priority(highest))
            .map_err(failed(FORM_ACTION))?;
        let communicator = Communicator::start(context, group.world_size(), group.rank(), id)?;
        wait(group, FORM_ACTION, timeout, || communicator.is_ready(FORM_ACTION))?;
        Ok(Self {
            communicator,
            compute,
            stream,
            timeout: group.mesh.timeout,
            scratch: None,
            under_way: VecDeque::new(),
            sent: 0,
            is_leaked: false,
        })
    }

    fn enqueue(
        &mut self,
        group: &mut Group,
        plan: &SegmentPlan,
        nodes: &[(NodeId, u64)],
        out: u64,
    ) -> Result<(), CollectiveError> {
        group.check()?;
        self.wait_until_under_way(group, MAX_UNDER_WAY - 1, self.timeout)?;
        let scratch = self.scratch(plan.scratch_elements())?;
        self.stream.join(&self.compute).map_err(failed(ALL_REDUCE_ACTION))?;
        let Self { communicator, stream, timeout, sent, .. } = self;
        let mut transport = NcclTransport { group, communicator, stream, timeout: *timeout, sent };
        plan.all_reduce(&mut transport, nodes, scratch, out)?;
        let end = self.stream.record_event(None).map_err(failed(ALL_REDUCE_ACTION))?;
        self.under_way.push_back(end);
        Ok(())
    }

    fn fail(&mut self, group: &mut Group, error: CollectiveError) -> CollectiveError {
        let error = attribute_error(group, error);
        self.stop();
        error
    }

    /// Ends the communicator. The compute stream goes on after what of it the GPU does yet, so that the vectors can be
    /// freed.
    fn stop(&mut self) {
        match self.communicator.close() {
            // Where this fails, so does everything on that stream.
            true => drop(self.compute.join(&self.stream)),
            false => self.is_leaked = true,
        }
    }

    /// Waits until at most `most` segments are under way.
    fn wait_until_under_way(
        &mut self,
        group: &mut Group,
        most: usize,
        timeout: Duration,
    ) -> Result<(), CollectiveError> {
        let Self { communicator, under_way, .. } = self;
        let Some(first) = under_way.len().checked_sub(most + 1) else { return Ok(()) };
        let end = &under_way[first];
        wait(group, ALL_REDUCE_ACTION, timeout, || {
            if end.try_is_complete().map_err(failed(ALL_REDUCE_ACTION))? {
                return Ok(true);
            }
            // Asked for its errors only: it has handed everything to the GPU.
            communicator.is_ready(ALL_REDUCE_ACTION)?;
            Ok(false)
        })?;
        under_way.drain(..=first);
        Ok(())
    }

    /// The address of `elements` elements. The segments take turns with them, as the stream is in order.
    fn scratch(&mut self, elements: usize) -> Result<u64, CollectiveError> {
        if self.scratch.as_ref().map_or(0, |scratch| scratch.len()) < elements {
            self.scratch = None;
            let allocated = lora_ops::cuda::allocate(&self.stream, elements);
            self.scratch = Some(allocated.map_err(|error| CollectiveError::Device {
                action: ALL_REDUCE_ACTION,
                message: error.to_string(),
            })?);
        }
        Ok(self.scratch.as_ref().map_or(0, |scratch| scratch.device_ptr(&self.stream).0))
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The offer of this process.
fn capabilities_of(preference: &Preference, gpu_uuid: &str) -> Capabilities {
    // As NCCL reads them: a variable that is no number is as good as not set.
    let is_on = |name| std::env::var(name).is_ok_and(|v| v.trim().parse::<i64>().is_ok_and(|v| v != 0));
    let nccl = match (&preference.nccl_failure, communicator::version()) {
        (Some(failure), _) => Err(format!(
            "it failed when an earlier group formed ({failure}); a new worker process tries again"
        )),
        // With that NCCL waits without end, whatever it is told.
        _ if is_on("NCCL_COMM_BLOCKING") => {
            Err("NCCL_COMM_BLOCKING is set, with which NCCL waits without end; it must not be set".to_owned())
        }
        (None, None) => Err("its library reports no version; NCCL 2 must be installed".to_owned()),
        (None, Some(version)) => Ok(version),
    };
    let host_id = std::env::var_os("NCCL_HOSTID").map(|id| {
        let id = id.as_encoded_bytes();
        String::from_utf8_lossy(&id[..id.len().min(HOST_ID_BYTES)]).into_owned()
    });
    Capabilities {
        wanted: preference.collective,
        nccl,
        gpu: gpu_uuid.to_owned(),
        host_id,
        shares_gpu: is_on("NCCL_MULTI_RANK_GPU_ENABLE"),
        gpus: lora_ops::cuda::devices(),
    }
}

/// Rank 0's new id of a communicator, on all ranks.
fn share_id(group: &mut Group) -> Result<sys::ncclUniqueId, CollectiveError> {
    let mut bytes = Vec::new();
    if group.rank() == 0 {
        bytes = communicator::new_id()?.internal.map(|byte| byte as u8).to_vec();
    }
    group.broadcast(0, &mut bytes)?;
    match <[u8; 128]>::try_from(bytes) {
        Ok(bytes) => Ok(sys::ncclUniqueId { internal: bytes.map(|byte| byte as _) }),
        Err(_) => Err(group.fail_peer(Operation::Broadcast, 0, PeerFailure::Malformed("no id of NCCL"))),
    }
}

/// An error of CUDA.
fn failed(action: &'static str) -> impl Fn(DriverError) -> CollectiveError {
    move |error| CollectiveError::Device { action, message: error.to_string() }
}
