//! Times on a device's own clock.

use std::time::Instant;

use candle_core::{Device, Result};

use crate::backend::Backend;

/// A moment in a device's work: on a GPU when everything before it is done, on the CPU now.
#[derive(Debug)]
pub struct DeviceTimestamp(Clock);

#[derive(Debug)]
enum Clock {
    Host(Instant),
    #[cfg(feature = "cuda")]
    Gpu(candle_core::cuda_backend::cudarc::driver::CudaEvent),
}

impl DeviceTimestamp {
    /// After everything that `device` was asked for so far. Does not wait.
    pub fn now(device: &Device) -> Result<Self> {
        Ok(Self(match Backend::of_device(device)? {
            Backend::Cpu => Clock::Host(Instant::now()),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => Clock::Gpu(gpu.timed_event()?),
        }))
    }

    /// Milliseconds from this moment to a later one of the same device. Waits until the later one has come.
    ///
    /// # Errors
    /// The two are of different devices.
    pub fn milliseconds_until(&self, later: &Self) -> Result<f64> {
        match (&self.0, &later.0) {
            (Clock::Host(from), Clock::Host(to)) => Ok(to.duration_since(*from).as_secs_f64() * 1e3),
            #[cfg(feature = "cuda")]
            (Clock::Gpu(from), Clock::Gpu(to)) => Ok(f64::from(
                from.elapsed_ms(to).map_err(crate::cuda::cuda_error("the time between events"))?,
            )),
            #[cfg(feature = "cuda")]
            _ => candle_core::bail!("the time between moments of different devices"),
        }
    }
}
