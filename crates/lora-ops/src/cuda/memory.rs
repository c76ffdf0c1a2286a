//! A GPU's memory: allocations from CUDA's stream-ordered pool, copies, and statistics.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DeviceRepr, DriverError, result, sys,
};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Result, Shape, Storage, Tensor, WithDType};
use half::bf16;

use super::error::{CudaResult, cuda_error};
use super::gpu::Gpu;
use super::input_upload::UploadedInput;
use super::pool::{pool_attribute, reset_pool_peak, trim_pool};
use crate::memory_usage::MemoryUsage;

/// Allocates uninitialized memory for `elements` f32 in the order of `stream`, which must be a
/// stream of an open GPU.
///
/// # Errors
/// The GPU is out of memory.
pub fn allocate(stream: &Arc<CudaStream>, elements: usize) -> Result<CudaSlice<f32>> {
    // SAFETY: the elements are plain numbers, and the caller writes them before reading them.
    let allocate = || unsafe { stream.alloc::<f32>(elements) };
    Gpu::from_stream(stream)?.retry_after_trim(elements * size_of::<f32>(), allocate)
}

impl Gpu {
    /// Creates a tensor with uninitialized elements.
    ///
    /// # Errors
    /// The GPU is out of memory, or the type is not f32, bf16, f64, u32 or u8.
    pub(crate) fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        // CUDA rejects an allocation of zero bytes.
        let len = shape.elem_count().max(1);
        let device = self.device.clone();
        let storage = match dtype {
            DType::F32 => CudaStorage::wrap_cuda_slice(self.allocate::<f32>(len)?, device),
            DType::BF16 => CudaStorage::wrap_cuda_slice(self.allocate::<bf16>(len)?, device),
            DType::F64 => CudaStorage::wrap_cuda_slice(self.allocate::<f64>(len)?, device),
            DType::U32 => CudaStorage::wrap_cuda_slice(self.allocate::<u32>(len)?, device),
            DType::U8 => CudaStorage::wrap_cuda_slice(self.allocate::<u8>(len)?, device),
            other => candle_core::bail!("no operation supports {other:?}"),
        };
        Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
    }

    fn allocate<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: the users of `empty` write the elements before anything reads them.
        self.retry_after_trim(len * size_of::<T>(), || unsafe { self.stream.alloc::<T>(len) })
    }

    /// Runs `allocate`, which takes `bytes` from the pool. If the GPU is out of memory, runs it
    /// once more after the pool has returned its unused memory: if the lengths of micro-batches
    /// vary, freed blocks of other sizes can occupy most of a GPU's memory.
    fn retry_after_trim<T>(&self, bytes: usize, allocate: impl Fn() -> CudaResult<T>) -> Result<T> {
        let allocated = allocate();
        if !allocated.as_ref().is_err_and(is_out_of_memory) {
            return allocated.map_err(cuda_error("memory"));
        }
        self.trim_pool().map_err(cuda_error("the memory pool"))?;
        let error = match allocate() {
            Ok(allocated) => return Ok(allocated),
            Err(error) => error,
        };
        // A failed allocation leaves all free memory of the GPU in the pool, where neither other
        // processes nor cuBLAS and NCCL could use it.
        self.trim_pool().map_err(cuda_error("the memory pool"))?;
        Err(match self.memory() {
            Ok(memory) if is_out_of_memory(&error) => {
                let MemoryUsage { used_bytes, reserved_bytes, total_bytes, .. } = memory;
                candle_core::Error::Msg(format!(
                    "the GPU is out of memory: an allocation of {} failed; tensors of this process use {}, \
                     and its memory pool has {} of the GPU's {}",
                    mib(bytes as u64),
                    mib(used_bytes),
                    mib(reserved_bytes),
                    mib(total_bytes)
                ))
                .bt()
            }
            _ => cuda_error("memory")(error),
        })
    }

    /// Starts the copy of `values`. Operations that are submitted after this call wait for the copy
    /// on the GPU.
    pub(crate) fn upload_input(&self, values: &[u32]) -> Result<UploadedInput> {
        let memory = self.uploader.pinned(values.len())?;
        // CUDA rejects an allocation of zero bytes.
        let bytes = size_of_val(values).max(size_of::<u32>());
        let uploaded = self.retry_after_trim(bytes, || self.uploader.allocate(bytes))?;
        self.uploader.start_copy(values, memory, &uploaded)?;
        Ok(uploaded)
    }

    /// Returns freed memory to the GPU, once the work that uses it is done.
    fn trim_pool(&self) -> CudaResult<()> {
        self.stream.synchronize()?;
        self.uploader.synchronize()?;
        trim_pool(self.stream.context())
    }

    /// Sets a contiguous tensor's elements to 0.
    pub(crate) fn zero(&self, tensor: &Tensor) -> Result<()> {
        let dtype = tensor.dtype();
        let (address, bytes) = (self.address(tensor, dtype)?, tensor.elem_count() * dtype.size_in_bytes());
        if bytes == 0 {
            return Ok(());
        }
        let set = || {
            self.stream.context().bind_to_thread()?;
            // SAFETY: the bytes belong to the tensor.
            unsafe { result::memset_d8_async(address, 0, bytes, self.stream.cu_stream()) }
        };
        set().map_err(cuda_error("zeros"))
    }

    /// Replaces the elements of a tensor. Waits until the copy is done.
    pub(crate) fn write<T: WithDType>(&self, tensor: &Tensor, values: &[T]) -> Result<()> {
        let to = self.address(tensor, T::DTYPE)?;
        if tensor.elem_count() != values.len() {
            candle_core::bail!(
                "invalid number of values: {} for a tensor {:?}",
                values.len(),
                tensor.shape()
            );
        }
        let write = || {
            self.stream.context().bind_to_thread()?;
            // SAFETY: the lengths are equal, and the copy is done before `values` can be dropped.
            unsafe { result::memcpy_htod_async(to, values, self.stream.cu_stream())? };
            self.stream.synchronize()
        };
        write().map_err(cuda_error("a copy to the GPU"))
    }

    /// Reads the elements of a tensor. Waits until the copy is done.
    pub(crate) fn read<T: WithDType>(&self, tensor: &Tensor, values: &mut [T]) -> Result<()> {
        let from = self.address(tensor, T::DTYPE)?;
        if tensor.elem_count() != values.len() {
            candle_core::bail!("invalid copy of a tensor {:?} to {} values", tensor.shape(), values.len());
        }
        let mut read = || {
            self.stream.context().bind_to_thread()?;
            // SAFETY: the lengths are equal, and the copy is done before `values` can be dropped.
            unsafe { result::memcpy_dtoh_async(values, from, self.stream.cu_stream())? };
            self.stream.synchronize()
        };
        read().map_err(cuda_error("a copy from the GPU"))
    }

    /// Returns the pool's unused memory to the GPU, and sets the peaks of [`Self::memory`] to what
    /// is used and reserved after that.
    pub(crate) fn reset_peak_memory(&self) -> Result<()> {
        let context = self.stream.context();
        let reset = || {
            context.bind_to_thread()?;
            self.trim_pool()?;
            for peak in [
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH,
            ] {
                reset_pool_peak(context, peak)?;
            }
            Ok(())
        };
        reset().map_err(cuda_error("the memory pool"))
    }

    pub(crate) fn memory(&self) -> Result<MemoryUsage> {
        let context = self.stream.context();
        let read = || {
            context.bind_to_thread()?;
            let of_pool = |attribute| pool_attribute(context, attribute);
            Ok(MemoryUsage {
                used_bytes: of_pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
                peak_bytes: of_pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
                reserved_bytes: of_pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
                peak_reserved_bytes: of_pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?,
                free_bytes: self.free,
                total_bytes: context.total_mem()? as u64,
            })
        };
        read().map_err(cuda_error("the GPU's memory"))
    }
}

fn is_out_of_memory(error: &DriverError) -> bool {
    error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
