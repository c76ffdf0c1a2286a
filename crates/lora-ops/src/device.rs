//! The device that a process computes on: opening it, its memory and its state.

use candle_core::{Result, Tensor};
use lora_spec::DeviceSpec;

use crate::backend::Backend;
use crate::cpu::update_f32;
pub use crate::gpu_properties::GpuProperties;
pub use crate::memory_usage::MemoryUsage;

/// Opens a device, once per process. `auto` is the first GPU if the build supports CUDA and the
/// machine has a GPU, and otherwise the CPU.
///
/// # Errors
/// A GPU that does not exist, libraries that are too old, or a build without CUDA.
pub fn open(device: DeviceSpec) -> Result<candle_core::Device> {
    match device {
        DeviceSpec::Cpu => Ok(candle_core::Device::Cpu),
        DeviceSpec::Auto if gpus() == 0 => Ok(candle_core::Device::Cpu),
        DeviceSpec::Auto => open_gpu(0),
        DeviceSpec::Cuda(ordinal) => open_gpu(ordinal),
    }
}

/// Returns the number of GPUs that this build can use on this machine; 0 for a build without CUDA.
pub fn gpus() -> usize {
    #[cfg(feature = "cuda")]
    return crate::cuda::devices();
    #[cfg(not(feature = "cuda"))]
    0
}

fn open_gpu(ordinal: usize) -> Result<candle_core::Device> {
    #[cfg(feature = "cuda")]
    return crate::cuda::open(ordinal);
    #[cfg(not(feature = "cuda"))]
    candle_core::bail!(
        "device cuda:{ordinal}: this build computes on CPUs only; build or install lora-worker with the \
         feature `cuda`"
    )
}

/// Describes everything about the device that the bits of a result depend on: the instruction set,
/// or the GPU and its libraries.
pub fn describe(device: &candle_core::Device) -> Result<String> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => crate::cuda::Gpu::from_device(device)?.describe(),
        _ => Ok(format!("cpu {}", crate::instruction_set())),
    }
}

/// Returns the properties of a GPU; `None` for the CPU.
pub fn gpu_properties(device: &candle_core::Device) -> Result<Option<GpuProperties>> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => crate::cuda::Gpu::from_device(device)?.properties().map(Some),
        _ => Ok(None),
    }
}

/// Returns the address of the first element of an f32 tensor on a GPU.
///
/// # Errors
/// The tensor is not on a GPU, not f32 or not contiguous.
pub fn gpu_address(tensor: &Tensor) -> Result<u64> {
    match tensor.device() {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => {
            crate::cuda::Gpu::from_device(device)?.address(tensor, candle_core::DType::F32)
        }
        _ => candle_core::bail!("a tensor that is not on a GPU has no GPU address"),
    }
}

/// Returns the memory of a GPU; `None` for the CPU.
pub fn memory(device: &candle_core::Device) -> Result<Option<MemoryUsage>> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => crate::cuda::Gpu::from_device(device)?.memory().map(Some),
        _ => Ok(None),
    }
}

/// Returns the pool's unused memory to the GPU, and sets the peaks of [`memory`] to what is used
/// and reserved after that. Waits for the GPU. Does nothing on the CPU.
pub fn reset_peak_memory(device: &candle_core::Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => crate::cuda::Gpu::from_device(device)?.reset_peak_memory(),
        _ => Ok(()),
    }
}

/// Checks whether a GPU still works, without waiting for it.
///
/// # Errors
/// The GPU has reported a permanent error.
pub fn check(device: &candle_core::Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => crate::cuda::Gpu::from_device(device)?.check(),
        _ => Ok(()),
    }
}

/// Replaces the elements of a contiguous f32 tensor. Waits until the copy is done.
pub fn write_f32(tensor: &Tensor, values: &[f32]) -> Result<()> {
    if tensor.elem_count() != values.len() {
        candle_core::bail!("invalid number of values: {} for a tensor {:?}", values.len(), tensor.shape());
    }
    match Backend::of_tensors(&[tensor])? {
        Backend::Cpu => {
            update_f32(tensor, &[])?.copy_from_slice(values);
            Ok(())
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => gpu.write(tensor, values),
    }
}

/// A point in the work that was submitted to a GPU.
#[derive(Debug)]
pub struct StreamEvent {
    #[cfg(feature = "cuda")]
    event: candle_core::cuda_backend::cudarc::driver::CudaEvent,
}

impl StreamEvent {
    /// Records an event after all work that was submitted so far; `None` on the CPU, where this
    /// work is already done.
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

    /// Waits until the work before the event is done.
    pub fn wait(self) -> Result<()> {
        #[cfg(feature = "cuda")]
        self.event.synchronize().map_err(crate::cuda::cuda_error("waiting for the GPU"))?;
        Ok(())
    }
}
