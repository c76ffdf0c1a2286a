//! Peaks of a GPU's memory pool, from a chosen point on.

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::{result, sys};

use super::gpu::{Gpu, wrong};

impl Gpu {
    /// Gives what the pool keeps unused back to the GPU, and sets the peaks to what is used and reserved then.
    pub(crate) fn reset_peaks(&self) -> Result<()> {
        let context = self.stream.context();
        let reset = || {
            self.stream.synchronize()?;
            // SAFETY: the pool is the device's, and the attributes are u64 that may be set to 0.
            unsafe {
                let pool = result::device::get_default_mem_pool(context.cu_device())?;
                sys::cuMemPoolTrimTo(pool, 0).result()?;
                for peak in [
                    sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH,
                    sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH,
                ] {
                    let mut zero = 0_u64;
                    result::mem_pool::set_attribute(pool, peak, (&raw mut zero).cast())?;
                }
            }
            Ok(())
        };
        context.bind_to_thread().and_then(|()| reset()).map_err(wrong("the memory pool"))
    }
}
