//! Times of a GPU's kernels and matrix products, measured with CUDA events. On the CPU nothing is
//! measured.
//!
//! Only launches on the compute stream are timed. Copies, fills with zeros and NCCL's stream are
//! not.

use candle_core::{Device, Result};

pub use crate::timing::Timing;

/// Starts timing the operations of all GPUs. Drops earlier timings.
pub fn start() {
    #[cfg(feature = "cuda")]
    crate::cuda::profile::start();
}

/// Waits for `device`, stops timing, and returns the timings since [`start`] in the order of the
/// first launches.
pub fn finish(device: &Device) -> Result<Vec<Timing>> {
    #[cfg(feature = "cuda")]
    crate::cuda::profile::stop();
    device.synchronize()?;
    #[cfg(feature = "cuda")]
    return crate::cuda::profile::finish();
    #[cfg(not(feature = "cuda"))]
    Ok(Vec::new())
}
