//! One communicator of NCCL: started without a wait, and taken down within a limit.

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
/// The version whose `ncclConfig_t` the bindings have.
const CONFIG_VERSION: u32 = 22_800;
/// NCCL's `NCCL_CONFIG_UNDEF_INT`.
const UNDEFINED: i32 = i32::MIN;

/// How long taking it down is waited for: NCCL may wait for what the GPU was asked for before.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// The version of the NCCL in this process; `None` where NCCL does not say.
pub(super) fn version() -> Option<u32> {
    let mut version = 0;
    // SAFETY: the pointer is to a number.
    let result = unsafe { sys::ncclGetVersion(&mut version) };
    (result == ncclResult_t::ncclSuccess).then(|| version.unsigned_abs())
}

/// An id that no communicator had.
pub(super) fn new_id() -> Result<sys::ncclUniqueId, CollectiveError> {
    let mut id = sys::ncclUniqueId { internal: [0; 128] };
    // SAFETY: the pointer is to an id.
    check_result(FORM_ACTION, unsafe { sys::ncclGetUniqueId(&mut id) })?;
    Ok(id)
}

/// `true` for what was done at once, `false` for what NCCL does in the background, where it may fail yet.
pub(super) fn check_result(action: &'static str, result: ncclResult_t) -> Result<bool, CollectiveError> {
    match result {
        ncclResult_t::ncclSuccess => Ok(true),
        ncclResult_t::ncclInProgress => Ok(false),
        error => Err(CollectiveError::Device { action, message: describe(error) }),
    }
}

/// A nonblocking communicator. Dropped, it is [closed](Self::close).
pub(super) struct Communicator {
    raw: sys::ncclComm_t,
    context: Arc<CudaContext>,
}

// SAFETY: NCCL binds a communicator to no thread; it wants one call after the other. Whatever calls NCCL here is called by
// methods of `NcclGroup` that borrow it exclusively.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Begins to connect; done once it [is ready](Self::is_ready).
    pub(super) fn start(
        context: &Arc<CudaContext>,
        world_size: usize,
        rank: usize,
        id: sys::ncclUniqueId,
    ) -> Result<Self, CollectiveError> {
        let mut communicator = Self { raw: ptr::null_mut(), context: context.clone() };
        let (world_size, rank) = (world_size as i32, rank as i32);
        // SAFETY: both pointers are to what they should be, and the context is bound. The config is copied.
        let result = unsafe {
            sys::ncclCommInitRankConfig(&mut communicator.raw, world_size, id, rank, &mut nonblocking())
        };
        check_result(FORM_ACTION, result)?;
        Ok(communicator)
    }

    /// Whether everything asked of it so far is done, or handed to the GPU.
    ///
    /// # Errors
    /// What of that failed, or failed on the GPU.
    pub(super) fn is_ready(&self, action: &'static str) -> Result<bool, CollectiveError> {
        check_result(action, state(self.raw)?)
    }

    pub(super) fn raw(&self) -> sys::ncclComm_t {
        self.raw
    }

    /// Aborts it. Whether that was done in time: a thread of its own does it, which past a limit is left behind and ends with
    /// the process at the latest.
    pub(super) fn close(&mut self) -> bool {
        let raw = std::mem::replace(&mut self.raw, ptr::null_mut());
        if raw.is_null() {
            return true;
        }
        let closing = Closing { raw, context: self.context.clone() };
        let (sender, closed) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("nccl-close".into()).spawn(move || {
            // Nobody may wait for it any more.
            let _ = sender.send(closing.abort());
        });
        let result = match thread {
            Ok(_) => closed.recv_timeout(CLOSE_TIMEOUT).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match &result {
            Ok(ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress) => {}
            Ok(error) => tracing::warn!(error = describe(*error), "nccl communicator not taken down cleanly"),
            Err(error) => tracing::warn!(error, "nccl communicator left behind"),
        }
        result.is_ok()
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.close();
    }
}

/// A communicator on its last way. NCCL lets one thread after the other use a communicator.
struct Closing {
    raw: sys::ncclComm_t,
    context: Arc<CudaContext>,
}

// SAFETY: the pointer has one owner, and whom it points to is bound to no thread.
unsafe impl Send for Closing {}

impl Closing {
    fn abort(self) -> ncclResult_t {
        // SAFETY: the context is alive. NCCL sets the device itself too; where this fails, so does that.
        let _ = unsafe { ctx::set_current(self.context.cu_ctx()) };
        // SAFETY: the communicator is alive, and nobody else has it.
        unsafe { sys::ncclCommAbort(self.raw) }
    }
}

fn state(raw: sys::ncclComm_t) -> Result<ncclResult_t, CollectiveError> {
    let mut state = ncclResult_t::ncclInProgress;
    // SAFETY: the communicator is alive, and the pointer is to a result.
    check_result(FORM_ACTION, unsafe { sys::ncclCommGetAsyncError(raw, &mut state) })?;
    Ok(state)
}

/// NCCL's `NCCL_CONFIG_INITIALIZER`, but for `blocking`.
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

/// What NCCL says about an error, on one line.
fn describe(error: ncclResult_t) -> String {
    // SAFETY: both return null or a string that lives on.
    let texts = unsafe { [sys::ncclGetErrorString(error), sys::ncclGetLastError(ptr::null_mut())] };
    let lines = texts.into_iter().map(one_line).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(": ")
}

fn one_line(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: it is a string of NCCL's.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
