//! Opening the device that a process computes on.

use candle_core::{Result, Tensor};
use lora_spec::DeviceSpec;

use crate::backend::Backend;
use crate::cpu::update_f32;

/// Opens the device that is asked for, once a process: `auto` is the first GPU in a build with CUDA on a machine that has
/// one, else the CPU.
///
/// # Errors
/// A GPU that is not there, libraries that are too old, or a build without CUDA.
pub fn open(device: DeviceSpec) -> Result<candle_core::Device> {
    match device {
        DeviceSpec::Cpu => Ok(candle_core::Device::Cpu),
        #[cfg(feature = "cuda")]
        DeviceSpec::Auto if crate::cuda::devices() == 0 => Ok(candle_core::Device::Cpu),
        #[cfg(feature = "cuda")]
        DeviceSpec::Auto => crate::cuda::open(0),
        #[cfg(feature = "cuda")]
        DeviceSpec::Cuda(ordinal) => crate::cuda::open(ordinal),
        #[cfg(not(feature = "cuda"))]
        DeviceSpec::Auto => Ok(candle_core::Device::Cpu),
        #[cfg(not(feature = "cuda"))]
        DeviceSpec::Cuda(_) => candle_core::bail!(
            "device {device}: this build computes on CPUs only; build or install lora-worker with the feature `cuda`"
        ),
    }
}

/// What the bits of a result depend on, of the device: the instruction set, or the GPU and its libraries.
pub fn describe(device: &candle_core::Device) -> Result<String> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => crate::cuda::Gpu::from_device(device)?.describe(),
        _ => Ok(format!("cpu {}", crate::instruction_set())),
    }
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Held by live tensors of this process.
    pub used_bytes: u64,
    /// The most that was ever held.
    pub peak_bytes: u64,
    /// Taken from the GPU by this process's memory pool: live tensors, and what it keeps for later ones.
    pub reserved_bytes: u64,
    /// The most that the pool ever had.
    pub peak_reserved_bytes: u64,
    /// Free when this process opened the device; CUDA's own and the kernels are not in it.
    pub free_bytes: u64,
    /// Of the device.
    pub total_bytes: u64,
}

/// Memory of a GPU; `None` for the CPU.
pub fn memory(device: &candle_core::Device) -> Result<Option<DeviceMemory>> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => crate::cuda::Gpu::from_device(device)?.memory().map(Some),
        _ => Ok(None),
    }
}

/// Sets the peaks of [`memory`] to what is used and reserved now, after the pool has given back what it keeps.
/// Waits for the GPU. Does nothing on the CPU.
pub fn reset_peak_memory(device: &candle_core::Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => crate::cuda::Gpu::from_device(device)?.reset_peak_memory(),
        _ => Ok(()),
    }
}

/// Asks a GPU whether it still works, without waiting for it.
///
/// # Errors
/// It reported an error that does not go away.
pub fn check(device: &candle_core::Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => crate::cuda::Gpu::from_device(device)?.check(),
        _ => Ok(()),
    }
}

/// Replaces the elements of a contiguous f32 tensor; waits until they are there.
pub fn write_f32(tensor: &Tensor, values: &[f32]) -> Result<()> {
    if tensor.elem_count() != values.len() {
        candle_core::bail!("{} values for {:?}", values.len(), tensor.shape());
    }
    match Backend::of_tensors(&[tensor])? {
        Backend::Cpu => update_f32(tensor, |to| to.copy_from_slice(values)),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => gpu.write(tensor, values),
    }
}

/// A point in the work that a GPU was asked for.
#[derive(Debug)]
pub struct StreamEvent {
    #[cfg(feature = "cuda")]
    event: candle_core::cuda_backend::cudarc::driver::CudaEvent,
}

impl StreamEvent {
    /// After everything that was asked for so far; `None` on the CPU, where that is done.
    pub fn record(device: &candle_core::Device) -> Result<Option<Self>> {
        match device {
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(device) => {
                let event = crate::cuda::Gpu::from_device(device)?.event()?;
                Ok(Some(Self { event }))
            }
            _ => Ok(None),
        }
    }

    /// Waits until the work before it is done.
    pub fn wait(self) -> Result<()> {
        #[cfg(feature = "cuda")]
        self.event.synchronize().map_err(crate::cuda::cuda_error("waiting for the GPU"))?;
        Ok(())
    }
}
