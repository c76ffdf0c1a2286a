//! Copies of windows of vectors in the host's memory, which overlap with the computation.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};
use candle_core::{DType, Result, Tensor};

use super::error::{CudaResult, cuda_error};
use super::gpu::Gpu;
use crate::cpu::{read, update_f32, update_u8};

/// Host memory below this number of bytes is not pinned, because pinning it does not pay off.
const MIN_PINNED_BYTES: usize = 64 << 10;

/// Pinned memory of a CPU tensor: copies access it directly, and the host does not wait for them.
#[derive(Debug)]
pub(crate) struct PinnedRegistration {
    address: u64,
    context: Arc<CudaContext>,
}

impl Drop for PinnedRegistration {
    fn drop(&mut self) {
        // SAFETY: the context is live, and the address was registered in it when `self` was
        // created.
        let unregistered = unsafe {
            result::ctx::set_current(self.context.cu_ctx())
                .and_then(|()| sys::cuMemHostUnregister(self.address as *mut c_void).result())
        };
        self.context.record_err(unregistered);
    }
}

/// Copies of windows on two streams, one for each direction, so that uploads and downloads can
/// overlap while a kernel runs. Dropping it waits for the copies, so no copy outlives the tensors
/// that it reads or writes.
pub(crate) struct WindowCopies<'a> {
    gpu: &'a Gpu,
}

impl Gpu {
    /// Pins the memory of a CPU tensor. Returns `None` for a small tensor, and, with a warning, if
    /// CUDA cannot pin the memory.
    pub(crate) fn pin(&self, tensor: &Tensor) -> Result<Option<PinnedRegistration>> {
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        if bytes < MIN_PINNED_BYTES {
            return Ok(None);
        }
        let address = match tensor.dtype() {
            DType::U8 => read::<u8>(tensor)?.as_ptr() as u64,
            DType::U32 => read::<u32>(tensor)?.as_ptr() as u64,
            _ => read::<f32>(tensor)?.as_ptr() as u64,
        };
        let context = self.stream.context().clone();
        let register = || -> CudaResult<()> {
            context.bind_to_thread()?;
            // SAFETY: the memory belongs to the tensor, and `PinnedRegistration` is dropped before
            // the tensor (see `paged::PinnedTensor`).
            unsafe { sys::cuMemHostRegister_v2(address as *mut c_void, bytes, 0).result() }
        };
        match register() {
            Ok(()) => Ok(Some(PinnedRegistration { address, context })),
            Err(error) => {
                tracing::warn!(bytes, ?error, "paged moments cannot be pinned; their copies are slow");
                Ok(None)
            }
        }
    }

    /// Prepares to copy windows. The buffers on the GPU must have been allocated before this
    /// call; the streams of the copies wait for these allocations.
    pub(crate) fn window_copies(&self) -> Result<WindowCopies<'_>> {
        let allocated = self.event()?;
        let wait = || {
            self.uploader.copies.wait(&allocated)?;
            self.downloads.wait(&allocated)
        };
        wait().map_err(cuda_error("a copy"))?;
        Ok(WindowCopies { gpu: self })
    }
}

impl WindowCopies<'_> {
    /// Starts copying CPU tensors to GPU tensors after the event `free`. Returns the event of their
    /// completion.
    pub(crate) fn upload(&self, pairs: &[(&Tensor, &Tensor)], free: Option<&CudaEvent>) -> Result<CudaEvent> {
        let stream = &self.gpu.uploader.copies;
        if let Some(free) = free {
            stream.wait(free).map_err(cuda_error("a copy"))?;
        }
        for (from, to) in pairs {
            let to = self.gpu.address(to, from.dtype())?;
            match from.dtype() {
                DType::U8 => to_gpu::<u8>(stream, &read(from)?, to),
                DType::U32 => to_gpu::<u32>(stream, &read(from)?, to),
                _ => to_gpu::<f32>(stream, &read(from)?, to),
            }
            .map_err(cuda_error("a copy to the GPU"))?;
        }
        stream.record_event(None).map_err(cuda_error("a copy to the GPU"))
    }

    /// Makes the compute stream wait for `uploaded`.
    pub(crate) fn compute_after(&self, uploaded: &CudaEvent) -> Result<()> {
        self.gpu.stream.wait(uploaded).map_err(cuda_error("a copy to the GPU"))
    }

    /// Starts copying GPU tensors to CPU tensors, after all work that was submitted to the compute
    /// stream so far. Returns the event of their completion.
    pub(crate) fn download(&self, pairs: &[(&Tensor, &Tensor)]) -> Result<CudaEvent> {
        let stream = &self.gpu.downloads;
        stream.wait(&self.gpu.event()?).map_err(cuda_error("a copy"))?;
        for (from, to) in pairs {
            let from = self.gpu.address(from, to.dtype())?;
            match to.dtype() {
                DType::U8 => from_gpu(stream, from, &mut update_u8(to, &[])?),
                _ => from_gpu(stream, from, &mut update_f32(to, &[])?),
            }
            .map_err(cuda_error("a copy from the GPU"))?;
        }
        stream.record_event(None).map_err(cuda_error("a copy from the GPU"))
    }

    /// Waits for all copies.
    pub(crate) fn finish(self) -> Result<()> {
        self.synchronize().map_err(cuda_error("a copy"))
    }

    fn synchronize(&self) -> CudaResult<()> {
        let context = self.gpu.stream.context();
        // Waits for both streams even if the first wait fails, and calls the driver directly,
        // because cudarc would return errors that it has kept of other calls.
        // SAFETY: context and streams are live.
        let (up, down) = unsafe {
            result::ctx::set_current(context.cu_ctx())?;
            (
                result::stream::synchronize(self.gpu.uploader.copies.cu_stream()),
                result::stream::synchronize(self.gpu.downloads.cu_stream()),
            )
        };
        up.and(down)
    }
}

impl Drop for WindowCopies<'_> {
    fn drop(&mut self) {
        // After `finish` no copy is pending; otherwise the caller already returns an error.
        self.gpu.stream.context().record_err(self.synchronize());
    }
}

fn to_gpu<T>(stream: &CudaStream, values: &[T], to: u64) -> CudaResult<()> {
    stream.context().bind_to_thread()?;
    // SAFETY: the allocation at `to` is large enough (the callers' tensors have equal lengths), and
    // the values live until the copies have been waited for.
    unsafe { result::memcpy_htod_async(to, values, stream.cu_stream()) }
}

fn from_gpu<T>(stream: &CudaStream, from: u64, values: &mut [T]) -> CudaResult<()> {
    stream.context().bind_to_thread()?;
    // SAFETY: as in `to_gpu`; nothing else accesses the values until the copy is done.
    unsafe { result::memcpy_dtoh_async(values, from, stream.cu_stream()) }
}
