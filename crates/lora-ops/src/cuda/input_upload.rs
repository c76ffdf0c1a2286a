//! Uploads of small inputs to the GPU, from pinned memory and on a separate stream: the next
//! micro-batch is copied while the current one is computed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice, result};

use super::arg::Arg;
use super::error::{CudaResult, cuda_error};

/// Input values on the GPU. Dropping it frees them after all work that was submitted so far.
#[derive(Debug)]
pub(crate) struct UploadedInput {
    address: u64,
    compute: Arc<CudaStream>,
}

impl UploadedInput {
    pub(crate) fn arg(&self) -> Arg {
        self.address.into()
    }
}

impl Drop for UploadedInput {
    fn drop(&mut self) {
        let context = self.compute.context();
        context.record_err(context.bind_to_thread());
        // SAFETY: this struct owns the allocation, and the compute stream has waited for its
        // upload.
        context.record_err(unsafe { result::free_async(self.address, self.compute.cu_stream()) });
    }
}

/// The stream for the uploads, and the pinned memory that they read.
pub(super) struct InputUploader {
    pub(super) copies: Arc<CudaStream>,
    compute: Arc<CudaStream>,
    pinned: Mutex<VecDeque<PinnedSlot>>,
}

/// Pinned memory that may be reused when its last copy is done. The oldest copy is at the front.
struct PinnedSlot {
    memory: PinnedHostSlice<u32>,
    copied: CudaEvent,
}

impl InputUploader {
    pub(super) fn new(compute: &Arc<CudaStream>) -> Result<Self> {
        let copies = compute.context().new_stream().map_err(cuda_error("a stream for copies"))?;
        Ok(Self { copies, compute: compute.clone(), pinned: Mutex::default() })
    }

    /// Waits for all copies.
    pub(super) fn synchronize(&self) -> CudaResult<()> {
        self.copies.synchronize()
    }

    /// Returns pinned memory for at least `len` numbers.
    pub(super) fn pinned(&self, len: usize) -> Result<PinnedHostSlice<u32>> {
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let free = pinned.iter().position(|p| p.memory.len() >= len && p.copied.is_complete());
        if let Some(PinnedSlot { memory, .. }) = free.and_then(|at| pinned.remove(at)) {
            return Ok(memory);
        }
        // SAFETY: the memory is written before a copy reads it.
        let memory = unsafe { self.copies.context().alloc_pinned(len.next_power_of_two().max(1024)) };
        memory.map_err(cuda_error("pinned memory"))
    }

    /// Allocates memory for an input of `bytes` bytes.
    pub(super) fn allocate(&self, bytes: usize) -> CudaResult<UploadedInput> {
        self.copies.context().bind_to_thread()?;
        // SAFETY: `UploadedInput` frees the allocation.
        let address = unsafe { result::malloc_async(self.copies.cu_stream(), bytes)? };
        Ok(UploadedInput { address, compute: self.compute.clone() })
    }

    /// Starts the copy of `values` to `input`, which was allocated for them, through `memory`. The
    /// compute stream waits for the copy.
    pub(super) fn start_copy(
        &self,
        values: &[u32],
        mut memory: PinnedHostSlice<u32>,
        input: &UploadedInput,
    ) -> Result<()> {
        let copy = || {
            memory.as_mut_slice()?[..values.len()].copy_from_slice(values);
            self.copies.context().bind_to_thread()?;
            let pinned = &memory.as_slice()?[..values.len()];
            // SAFETY: the pinned memory is not reused before `copied`, and the allocation is not
            // used before the compute stream has waited for `copied`.
            unsafe { result::memcpy_htod_async(input.address, pinned, self.copies.cu_stream())? };
            let copied = self.copies.record_event(None)?;
            self.compute.wait(&copied)?;
            let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
            pinned.push_back(PinnedSlot { memory, copied });
            Ok(())
        };
        copy().map_err(cuda_error("a copy to the GPU"))
    }
}
