//! Copies beside the computation: windows of vectors that lie in the host's memory.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DriverError, result, sys,
};
use candle_core::{DType, Result, Tensor};

use super::gpu::{Gpu, cuda_error};
use crate::cpu::{read, update_f32, update_u8};

/// Host memory below this is not worth pinning, in bytes.
const MIN_PINNED_BYTES: usize = 64 << 10;

/// Memory of a CPU tensor that is pinned: copies use it as it is, and the host does not wait for them.
#[derive(Debug)]
pub(crate) struct PinnedRegistration {
    address: u64,
    context: Arc<CudaContext>,
}

impl Drop for PinnedRegistration {
    fn drop(&mut self) {
        // SAFETY: the context is live, and the address was registered in it when this was made.
        let unregistered = unsafe {
            result::ctx::set_current(self.context.cu_ctx())
                .and_then(|()| sys::cuMemHostUnregister(self.address as *mut c_void).result())
        };
        self.context.record_err(unregistered);
    }
}

/// Copies of windows on two streams, one a direction, so that both can be under way while a kernel runs.
/// Dropping it waits for them: no copy outlives the tensors it reads or writes.
pub(crate) struct WindowCopies<'a> {
    gpu: &'a Gpu,
}

impl Gpu {
    /// Pins the memory of a CPU tensor; `None` for a small one, and, with a warning, where CUDA refuses.
    pub(crate) fn pin(&self, tensor: &Tensor) -> Result<Option<PinnedRegistration>> {
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        if bytes < MIN_PINNED_BYTES {
            return Ok(None);
        }
        let address = match tensor.dtype() {
            DType::U8 => read(tensor, |values: &[u8]| values.as_ptr() as u64)?,
            DType::U32 => read(tensor, |values: &[u32]| values.as_ptr() as u64)?,
            _ => read(tensor, |values: &[f32]| values.as_ptr() as u64)?,
        };
        let context = self.stream.context().clone();
        let register = || -> std::result::Result<(), DriverError> {
            context.bind_to_thread()?;
            // SAFETY: the memory is the tensor's, and `PinnedRegistration` is dropped before it (see `paged::PinnedRegistration`).
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

    /// Copies of windows, from now on: the buffers on the GPU that they use are allocated already.
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
    /// Starts copying CPU tensors to GPU tensors, once `free` has happened; gives the end of that.
    pub(crate) fn upload(&self, pairs: &[(&Tensor, &Tensor)], free: Option<&CudaEvent>) -> Result<CudaEvent> {
        let stream = &self.gpu.uploader.copies;
        if let Some(free) = free {
            stream.wait(free).map_err(cuda_error("a copy"))?;
        }
        for (from, to) in pairs {
            let to = self.gpu.address(to, from.dtype())?;
            match from.dtype() {
                DType::U8 => read(from, |values: &[u8]| to_gpu(stream, values, to))?,
                DType::U32 => read(from, |values: &[u32]| to_gpu(stream, values, to))?,
                _ => read(from, |values: &[f32]| to_gpu(stream, values, to))?,
            }
            .map_err(cuda_error("a copy to the GPU"))?;
        }
        stream.record_event(None).map_err(cuda_error("a copy to the GPU"))
    }

    /// Lets the computation go on after `uploaded`.
    pub(crate) fn compute_after(&self, uploaded: &CudaEvent) -> Result<()> {
        self.gpu.stream.wait(uploaded).map_err(cuda_error("a copy to the GPU"))
    }

    /// Starts copying GPU tensors to CPU tensors after all that was asked of the GPU so far; gives the end
    /// of that.
    pub(crate) fn download(&self, pairs: &[(&Tensor, &Tensor)]) -> Result<CudaEvent> {
        let stream = &self.gpu.downloads;
        stream.wait(&self.gpu.event()?).map_err(cuda_error("a copy"))?;
        for (from, to) in pairs {
            let from = self.gpu.address(from, to.dtype())?;
            match to.dtype() {
                DType::U8 => update_u8(to, |values| from_gpu(stream, from, values))?,
                _ => update_f32(to, |values| from_gpu(stream, from, values))?,
            }
            .map_err(cuda_error("a copy from the GPU"))?;
        }
        stream.record_event(None).map_err(cuda_error("a copy from the GPU"))
    }

    /// Waits for all of them.
    pub(crate) fn finish(self) -> Result<()> {
        self.synchronize().map_err(cuda_error("a copy"))
    }

    fn synchronize(&self) -> std::result::Result<(), DriverError> {
        let context = self.gpu.stream.context();
        // Both, whatever the first says, and past errors that cudarc has kept of other calls.
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
        // After `finish` nothing is under way; else the caller has an error of its own.
        self.gpu.stream.context().record_err(self.synchronize());
    }
}

fn to_gpu<T>(stream: &CudaStream, values: &[T], to: u64) -> std::result::Result<(), DriverError> {
    stream.context().bind_to_thread()?;
    // SAFETY: `to` has room for the values (the callers' tensors are equally long), which live until the
    // copies were waited for.
    unsafe { result::memcpy_htod_async(to, values, stream.cu_stream()) }
}

fn from_gpu<T>(stream: &CudaStream, from: u64, values: &mut [T]) -> std::result::Result<(), DriverError> {
    stream.context().bind_to_thread()?;
    // SAFETY: as in `to_gpu`; nothing else uses the values meanwhile.
    unsafe { result::memcpy_dtoh_async(values, from, stream.cu_stream()) }
}
