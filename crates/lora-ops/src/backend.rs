//! The backend of an operation, which follows from the device of its tensors.

use candle_core::{Device, Result, Tensor};

#[cfg(feature = "cuda")]
use crate::cuda::Gpu;

/// The backend for the one device of an operation's tensors.
pub(crate) enum Backend {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<Gpu>),
}

impl Backend {
    /// The backend for the device of `tensors`; there must be at least one tensor.
    ///
    /// # Errors
    /// The tensors are not all on one device, or this build cannot compute on that device.
    pub(crate) fn of_tensors(tensors: &[&Tensor]) -> Result<Self> {
        let Some(first) = tensors.first() else { candle_core::bail!("an operation without tensors") };
        if let Some(other) = tensors.iter().find(|other| !other.device().same_device(first.device())) {
            candle_core::bail!(
                "an operation's tensors are on {:?} and on {:?}; they must be on one device",
                first.device().location(),
                other.device().location()
            );
        }
        Self::of_device(first.device())
    }

    /// The backend for a device.
    ///
    /// # Errors
    /// This build cannot compute on the device.
    pub(crate) fn of_device(device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(Gpu::from_device(device)?)),
            other => candle_core::bail!("this build cannot compute on {:?}", other.location()),
        }
    }
}
