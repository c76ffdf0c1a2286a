//! Time stamps of a device's own clock.

use std::time::Instant;

use candle_core::{Device, Result};

use crate::backend::Backend;

/// A point in a device's work: on a GPU the time when all earlier work is done, on the CPU the
/// current time.
#[derive(Debug)]
pub struct DeviceTimestamp(Clock);

#[derive(Debug)]
enum Clock {
    Host(Instant),
    #[cfg(feature = "cuda")]
    Gpu(candle_core::cuda_backend::cudarc::driver::CudaEvent),
}

impl DeviceTimestamp {
    /// Takes a time stamp after all work that was submitted to `device` so far. Does not wait.
    pub fn now(device: &Device) -> Result<Self> {
        Ok(Self(match Backend::of_device(device)? {
            Backend::Cpu => Clock::Host(Instant::now()),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => Clock::Gpu(gpu.timed_event()?),
        }))
    }

    /// Returns the milliseconds from this time stamp to a later one of the same device. Waits until
    /// the later one has passed.
    ///
    /// # Errors
    /// The time stamps are of different devices.
    pub fn milliseconds_until(&self, later: &Self) -> Result<f64> {
        match (&self.0, &later.0) {
            (Clock::Host(from), Clock::Host(to)) => Ok(to.duration_since(*from).as_secs_f64() * 1e3),
            #[cfg(feature = "cuda")]
            (Clock::Gpu(from), Clock::Gpu(to)) => Ok(f64::from(
                from.elapsed_ms(to).map_err(crate::cuda::cuda_error("the time between events"))?,
            )),
            #[cfg(feature = "cuda")]
            _ => candle_core::bail!("time stamps of different devices cannot be compared"),
        }
    }
}
