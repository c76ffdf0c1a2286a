//! The all-reduce between GPUs over NCCL.
//!
//! Every communicator has a [`Group`]. The group transmits NCCL's unique id. Every wait for NCCL or
//! a GPU also checks the group, so that a lost peer, a cancellation or a timeout ends the wait. The
//! communicator is nonblocking, because NCCL's own waits have no time limit.

mod communicator;
mod transport;
mod wait;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, result::stream};
use cudarc::nccl::sys;
use lora_ops::cuda;

use crate::backend_choice::{self, Capabilities, Collective, CollectiveBackend, Preference};
use crate::error::{CollectiveError, Operation, PeerFailure};
use crate::group::Group;
use crate::segmented_all_reduce::SegmentPlan;
use crate::tree::NodeId;
use communicator::Communicator;
use transport::NcclTransport;
use wait::{attribute_error, wait};

const FORM_ACTION: &str = "forming the group";
const ALL_REDUCE_ACTION: &str = "all-reduce";

/// The maximum number of segments in progress. Further segments wait on the CPU, where a wait can
/// be ended: a full stream would block the caller.
const MAX_IN_PROGRESS: usize = 16;

/// The number of bytes of `NCCL_HOSTID` that NCCL uses.
const HOST_ID_BYTES: usize = 1023;

/// The maximum time that [`NcclGroup::finish`] waits for the GPUs, for transfers that all ranks
/// have begun.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(120);

/// An NCCL communicator with its own stream, used together with a [`Group`]. One thread owns it.
///
/// All ranks call the same methods in the same order with the same arguments, except for their own
/// nodes and addresses. An error aborts the work in progress, and neither the group nor this
/// communicator can be used any more. Dropping the communicator before [`Self::finish`] has the
/// same effect.
pub struct NcclGroup {
    communicator: Communicator,
    compute: Arc<CudaStream>,
    stream: Arc<CudaStream>,
    timeout: Duration,
    /// Device buffer of the all-reduce, reused by the next call.
    scratch: Option<CudaSlice<f32>>,
    /// The end event of each segment that is not known to be finished.
    in_progress: VecDeque<CudaEvent>,
    sent: u64,
    /// Whether the communicator could not be aborted and may still use memory of the GPU.
    is_leaked: bool,
}

impl NcclGroup {
    /// Agrees with the other ranks of `group` on NCCL or TCP, from the preferences and capabilities
    /// of all ranks (see [`backend_choice::choose`]). `gpu_uuid` is the UUID of this rank's GPU, or
    /// `None` if the device is a CPU. All ranks of a group have the same kind of device. A group of
    /// one rank needs no NCCL.
    ///
    /// # Errors
    /// Those of [`backend_choice::agree`]; [`CollectiveError::Argument`] if this rank requires NCCL
    /// on a CPU.
    pub fn agree(
        group: &mut Group,
        preference: &Preference,
        gpu_uuid: Option<&str>,
    ) -> Result<CollectiveBackend, CollectiveError> {
        match (gpu_uuid, preference.collective) {
            _ if group.world_size() == 1 => Ok(CollectiveBackend::Tcp),
            (Some(gpu_uuid), _) => backend_choice::agree(group, &capabilities_of(preference, gpu_uuid)),
            (None, Collective::Nccl) => {
                let message = "collective nccl: the device is a CPU; use auto or tcp".to_owned();
                Err(CollectiveError::Argument(message))
            }
            (None, Collective::Auto | Collective::Tcp) => Ok(CollectiveBackend::Tcp),
        }
    }

    /// Connects the GPUs of all ranks. `gpu` is the number of this rank's GPU, on whose compute
    /// stream the vectors are computed. `timeout` limits the connection. Later waits, during which
    /// peers may still compute, have the timeout of the group.
    ///
    /// # Errors
    /// A failure of NCCL, CUDA or a peer, a cancellation, or a timeout.
    pub fn form(group: &mut Group, gpu: usize, timeout: Duration) -> Result<Self, CollectiveError> {
        let formed = Self::connect(group, gpu, timeout);
        formed.map_err(|error| attribute_error(group, error))
    }

    /// Enqueues the sum of one segment of the ranks' vectors over all leaves. The GPU computes the
    /// sum after the work that is on the compute stream now. The method returns as soon as the work
    /// is enqueued. The vectors are in use until [`Self::finish`] returns.
    ///
    /// `nodes` are the nodes of this rank, each with the address of the segment in its vector.
    /// `out` is the address of the sum and may be one of them. The bits are those of
    /// [`Group::all_reduce_tree`].
    ///
    /// # Errors
    /// Those of [`Self::form`], ranges that are not a partition of the leaves, or nodes that are
    /// not the nodes of this rank's range.
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

    /// Waits until all segments are summed on all ranks, and makes the compute stream wait for the
    /// sums. The wait for the GPUs is at most 120 s. It is meant for transfers that all ranks have
    /// begun, not for ranks that have not begun them.
    ///
    /// # Errors
    /// Those of [`Self::form`]. The sums must then not be used.
    pub fn finish(&mut self, group: &mut Group) -> Result<(), CollectiveError> {
        group.check_usable()?;
        let finished = self.limit_in_progress(group, 0, self.timeout.min(TRANSFER_TIMEOUT));
        // On the GPU, a receive from a rank that aborts can end as if all data had arrived. Such a
        // rank has left the group before it aborts, so the sums are valid only if all ranks pass
        // this barrier.
        let agreed = finished.and_then(|()| group.barrier());
        let joined = agreed.and_then(|()| self.compute.join(&self.stream).map_err(failed(ALL_REDUCE_ACTION)));
        joined.map_err(|error| self.fail(group, error))
    }

    /// Aborts the communicator.
    ///
    /// # Errors
    /// The communicator cannot be aborted. Memory of the GPU may then stay in use, and the process
    /// must exit.
    pub fn leave(mut self) -> Result<(), CollectiveError> {
        self.stop();
        match self.is_leaked {
            false => Ok(()),
            true => {
                let message = "the communicator cannot be aborted".to_owned();
                Err(CollectiveError::Device { action: "leaving the group", message })
            }
        }
    }

    /// The number of bytes sent to all peers so far.
    pub fn bytes_sent(&self) -> u64 {
        self.sent
    }

    fn connect(group: &mut Group, gpu: usize, timeout: Duration) -> Result<Self, CollectiveError> {
        let compute = cuda::open(gpu).and_then(|device| cuda::stream(&device));
        let compute = compute.map_err(failed(FORM_ACTION))?;
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
            in_progress: VecDeque::new(),
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
        self.limit_in_progress(group, MAX_IN_PROGRESS - 1, self.timeout)?;
        let scratch = self.scratch(plan.scratch_elements())?;
        self.stream.join(&self.compute).map_err(failed(ALL_REDUCE_ACTION))?;
        let Self { communicator, stream, timeout, sent, .. } = self;
        let mut transport = NcclTransport { group, communicator, stream, timeout: *timeout, sent };
        plan.all_reduce(&mut transport, nodes, scratch, out)?;
        let end = self.stream.record_event(None).map_err(failed(ALL_REDUCE_ACTION))?;
        self.in_progress.push_back(end);
        Ok(())
    }

    fn fail(&mut self, group: &mut Group, error: CollectiveError) -> CollectiveError {
        let error = attribute_error(group, error);
        self.stop();
        error
    }

    /// Aborts the communicator. The compute stream waits for the communicator's work that is still
    /// on the GPU, so that the vectors can be freed.
    fn stop(&mut self) {
        match self.communicator.close() {
            // If this fails, everything else on the compute stream fails as well.
            true => drop(self.compute.join(&self.stream)),
            false => self.is_leaked = true,
        }
    }

    /// Waits until at most `most` segments are in progress.
    fn limit_in_progress(
        &mut self,
        group: &mut Group,
        most: usize,
        timeout: Duration,
    ) -> Result<(), CollectiveError> {
        let Self { communicator, in_progress, .. } = self;
        let Some(first) = in_progress.len().checked_sub(most + 1) else { return Ok(()) };
        let end = &in_progress[first];
        wait(group, ALL_REDUCE_ACTION, timeout, || {
            if end.try_is_complete().map_err(failed(ALL_REDUCE_ACTION))? {
                return Ok(true);
            }
            // Only to get errors: NCCL has already handed all work to the GPU.
            communicator.is_ready(ALL_REDUCE_ACTION)?;
            Ok(false)
        })?;
        in_progress.drain(..=first);
        Ok(())
    }

    /// Returns the address of a buffer of at least `elements` elements. All segments use the same
    /// buffer, because the stream executes them in order.
    fn scratch(&mut self, elements: usize) -> Result<u64, CollectiveError> {
        if self.scratch.as_ref().map_or(0, |scratch| scratch.len()) < elements {
            self.scratch = None;
            let allocated = cuda::allocate(&self.stream, elements);
            self.scratch = Some(allocated.map_err(failed(ALL_REDUCE_ACTION))?);
        }
        Ok(self.scratch.as_ref().map_or(0, |scratch| scratch.device_ptr(&self.stream).0))
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Returns the capabilities of this process.
fn capabilities_of(preference: &Preference, gpu_uuid: &str) -> Capabilities {
    // Like NCCL: a variable whose value is not a number counts as not set.
    let is_on = |name| std::env::var(name).is_ok_and(|v| v.trim().parse::<i64>().is_ok_and(|v| v != 0));
    let nccl = match (&preference.nccl_failure, communicator::version()) {
        (Some(failure), _) => Err(format!(
            "it failed when an earlier group formed ({failure}); a new worker process tries again"
        )),
        // The variable overrides the nonblocking configuration of the communicator.
        _ if is_on("NCCL_COMM_BLOCKING") => {
            Err("NCCL_COMM_BLOCKING is set, so NCCL waits without a limit; it must not be set".to_owned())
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
        gpus: cuda::devices(),
    }
}

/// Creates the unique id of a communicator on rank 0 and returns it on all ranks.
fn share_id(group: &mut Group) -> Result<sys::ncclUniqueId, CollectiveError> {
    let mut bytes = Vec::new();
    if group.rank() == 0 {
        bytes = communicator::new_id()?.internal.map(|byte| byte as u8).to_vec();
    }
    group.broadcast(0, &mut bytes)?;
    match <[u8; 128]>::try_from(bytes) {
        Ok(bytes) => Ok(sys::ncclUniqueId { internal: bytes.map(|byte| byte as _) }),
        Err(_) => Err(group.fail_peer(Operation::Broadcast, 0, PeerFailure::Malformed("invalid NCCL id"))),
    }
}

/// Converts an error of CUDA.
fn failed<E: ToString>(action: &'static str) -> impl Fn(E) -> CollectiveError {
    move |error| CollectiveError::Device { action, message: error.to_string() }
}
