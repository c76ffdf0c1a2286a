//! Where an operation runs: where its tensors are.

use candle_core::{Device, Result, Tensor};

#[cfg(feature = "cuda")]
use crate::cuda::Gpu;

/// The one device of an operation's tensors.
pub(crate) enum Backend {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<Gpu>),
}

impl Backend {
    /// The device of `tensors` (at least one).
    ///
    /// # Errors
    /// They are not all on one device, or on one that this build cannot compute on.
    pub(crate) fn of_tensors(tensors: &[&Tensor]) -> Result<Self> {
        let Some(first) = tensors.first() else { candle_core::bail!("an operation without tensors") };
        if let Some(other) = tensors.iter().find(|other| !other.device().same_device(first.device())) {
            candle_core::bail!(
                "an operation's tensors are on {:?} and on {:?}",
                first.device().location(),
                other.device().location()
            );
        }
        Self::of_device(first.device())
    }

    /// Of a device.
    pub(crate) fn of_device(device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(Gpu::from_device(device)?)),
            other => candle_core::bail!("nothing is computed on {:?}", other.location()),
        }
    }
}
