//! An NCCL communicator that is started without waiting and aborted within a time limit.

use std::ffi::{CStr, c_char};
use std::ptr;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use cudarc::driver::CudaContext;
use cudarc::driver::result::ctx;
use cudarc::nccl::sys::{self, ncclResult_t};

use super::FORM_ACTION;
use crate::error::CollectiveError;

/// NCCL's `NCCL_API_MAGIC`.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// The NCCL version of the bindings' `ncclConfig_t`.
const CONFIG_VERSION: u32 = 22_800;
/// NCCL's `NCCL_CONFIG_UNDEF_INT`.
const UNDEFINED: i32 = i32::MIN;

/// The time limit of an abort. NCCL may wait for work that is already on the GPU.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Returns the version of the NCCL library in this process; `None` if NCCL does not report one.
pub(super) fn version() -> Option<u32> {
    let mut version = 0;
    // SAFETY: the pointer is valid and points to an integer.
    let result = unsafe { sys::ncclGetVersion(&mut version) };
    (result == ncclResult_t::ncclSuccess).then(|| version.unsigned_abs())
}

/// Creates a new unique id.
pub(super) fn new_id() -> Result<sys::ncclUniqueId, CollectiveError> {
    let mut id = sys::ncclUniqueId { internal: [0; 128] };
    // SAFETY: the pointer is valid and points to an id.
    check_result(FORM_ACTION, unsafe { sys::ncclGetUniqueId(&mut id) })?;
    Ok(id)
}

/// Returns true if the call has finished, and false if NCCL continues it in the background, where
/// it may still fail.
pub(super) fn check_result(action: &'static str, result: ncclResult_t) -> Result<bool, CollectiveError> {
    match result {
        ncclResult_t::ncclSuccess => Ok(true),
        ncclResult_t::ncclInProgress => Ok(false),
        error => Err(CollectiveError::Device { action, message: describe(error) }),
    }
}

/// A nonblocking communicator. Dropping it [closes](Self::close) it.
pub(super) struct Communicator {
    raw: sys::ncclComm_t,
    context: Arc<CudaContext>,
}

// SAFETY: NCCL does not bind a communicator to a thread, but its calls must not overlap. All calls
// of NCCL are made by methods of `NcclGroup` that borrow it exclusively.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Begins to connect. The connection is complete once [`Self::is_ready`] returns true.
    pub(super) fn start(
        context: &Arc<CudaContext>,
        world_size: usize,
        rank: usize,
        id: sys::ncclUniqueId,
    ) -> Result<Self, CollectiveError> {
        let mut communicator = Self { raw: ptr::null_mut(), context: context.clone() };
        let (world_size, rank) = (world_size as i32, rank as i32);
        // SAFETY: both pointers are valid and have the right types, and the context is bound. NCCL
        // copies the config.
        let result = unsafe {
            sys::ncclCommInitRankConfig(&mut communicator.raw, world_size, id, rank, &mut nonblocking())
        };
        check_result(FORM_ACTION, result)?;
        Ok(communicator)
    }

    /// Returns whether all calls so far have finished or have handed their work to the GPU.
    ///
    /// # Errors
    /// A call or its work on the GPU failed.
    pub(super) fn is_ready(&self, action: &'static str) -> Result<bool, CollectiveError> {
        check_result(action, state(self.raw)?)
    }

    pub(super) fn raw(&self) -> sys::ncclComm_t {
        self.raw
    }

    /// Aborts the communicator and returns whether this finished within [`CLOSE_TIMEOUT`]. A
    /// separate thread aborts it. After the time limit the thread is no longer waited for, and it
    /// may run until the process exits.
    pub(super) fn close(&mut self) -> bool {
        let raw = std::mem::replace(&mut self.raw, ptr::null_mut());
        if raw.is_null() {
            return true;
        }
        let closing = Closing { raw, context: self.context.clone() };
        let (sender, closed) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("nccl-close".into()).spawn(move || {
            // Sending fails if the caller has stopped waiting.
            let _ = sender.send(closing.abort());
        });
        let result = match thread {
            Ok(_) => closed.recv_timeout(CLOSE_TIMEOUT).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match &result {
            Ok(ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress) => {}
            Ok(error) => tracing::warn!(error = describe(*error), "aborting an nccl communicator failed"),
            Err(error) => tracing::warn!(error, "aborting an nccl communicator did not finish"),
        }
        result.is_ok()
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.close();
    }
}

/// A communicator that is being aborted. NCCL allows different threads to use a communicator one
/// after the other.
struct Closing {
    raw: sys::ncclComm_t,
    context: Arc<CudaContext>,
}

// SAFETY: the pointer has one owner, and the communicator is not bound to a thread.
unsafe impl Send for Closing {}

impl Closing {
    fn abort(self) -> ncclResult_t {
        // SAFETY: the context is alive. The result can be ignored, because NCCL sets the device as
        // well and fails in the same case.
        let _ = unsafe { ctx::set_current(self.context.cu_ctx()) };
        // SAFETY: the communicator is alive, and nothing else uses it.
        unsafe { sys::ncclCommAbort(self.raw) }
    }
}

fn state(raw: sys::ncclComm_t) -> Result<ncclResult_t, CollectiveError> {
    let mut state = ncclResult_t::ncclInProgress;
    // SAFETY: the communicator is alive, and the pointer is valid and points to a result.
    check_result(FORM_ACTION, unsafe { sys::ncclCommGetAsyncError(raw, &mut state) })?;
    Ok(state)
}

/// NCCL's `NCCL_CONFIG_INITIALIZER`, except for `blocking`.
fn nonblocking() -> sys::ncclConfig_t {
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

/// Returns NCCL's messages about an error, on one line.
fn describe(error: ncclResult_t) -> String {
    // SAFETY: both functions return null or a string that stays valid.
    let texts = unsafe { [sys::ncclGetErrorString(error), sys::ncclGetLastError(ptr::null_mut())] };
    let lines = texts.into_iter().map(one_line).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(": ")
}

fn one_line(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the pointer is a string from NCCL.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
