//! CUDA's stream-ordered memory pool of a GPU, from which all tensors are allocated.

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, result, sys};

use super::error::{CudaResult, cuda_error};

/// Checks that the GPU has a memory pool.
///
/// # Errors
/// The driver does not support memory pools for this GPU.
pub(super) fn check_memory_pools(ordinal: usize) -> Result<()> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    // SAFETY: CUDA is initialized, because the GPUs have been counted.
    let supported = unsafe {
        result::device::get(ordinal as i32)
            .and_then(|device| result::device::get_attribute(device, attribute))
    };
    match supported {
        Ok(0) => candle_core::bail!(
            "device cuda:{ordinal}: the driver offers no memory pools \
             (CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED is 0), from which every tensor is allocated; some \
             vGPU profiles, WSL and sandboxed containers lack them; use a GPU that is passed through whole"
        ),
        Ok(_) => Ok(()),
        Err(error) => Err(cuda_error("the GPU's memory pools")(error)),
    }
}

/// Makes the pool keep freed memory, because the next step needs it again.
pub(super) fn set_pool_release_threshold(context: &CudaContext) -> CudaResult<()> {
    let mut all = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute's value is a u64.
    unsafe { result::mem_pool::set_attribute(pool(context)?, attribute, (&raw mut all).cast()) }
}

/// Returns the pool's unused memory to the GPU.
pub(super) fn trim_pool(context: &CudaContext) -> CudaResult<()> {
    // SAFETY: the pool is the device's default pool, which lives as long as the process.
    unsafe { result::mem_pool::trim_to(pool(context)?, 0) }
}

/// Sets the peak that `attribute` names to the current value.
pub(super) fn reset_pool_peak(context: &CudaContext, attribute: sys::CUmemPool_attribute) -> CudaResult<()> {
    let mut zero = 0_u64;
    // SAFETY: the attribute's value is a u64, which may be 0.
    unsafe { result::mem_pool::set_attribute(pool(context)?, attribute, (&raw mut zero).cast()) }
}

fn pool(context: &CudaContext) -> CudaResult<sys::CUmemoryPool> {
    // SAFETY: the context is live.
    unsafe { result::device::get_default_mem_pool(context.cu_device()) }
}

/// Returns the value of an attribute that is a u64.
pub(super) fn pool_attribute(context: &CudaContext, attribute: sys::CUmemPool_attribute) -> CudaResult<u64> {
    let mut value = 0_u64;
    // SAFETY: the requested attributes are u64.
    unsafe { result::mem_pool::get_attribute(pool(context)?, attribute, (&raw mut value).cast())? };
    Ok(value)
}
