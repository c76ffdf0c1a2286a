//! The device that a process trains on.

pub use lora_ops::device::{GpuProperties, MemoryUsage, gpus};

use crate::error::TrainError;

/// A device that was opened with [`open_device`].
pub type ComputeDevice = candle_core::Device;

/// Opens the device that a worker computes on. A process calls it once.
///
/// # Errors
/// The GPU does not exist or cannot be used, or the build has no CUDA.
pub fn open_device(device: lora_spec::DeviceSpec) -> Result<ComputeDevice, TrainError> {
    Ok(lora_ops::device::open(device)?)
}

/// Returns the use of a GPU's memory; `None` for the CPU.
pub fn memory_usage(device: &ComputeDevice) -> Result<Option<MemoryUsage>, TrainError> {
    Ok(lora_ops::device::memory(device)?)
}

/// Returns the properties of a GPU; `None` for the CPU.
pub fn gpu_properties(device: &ComputeDevice) -> Result<Option<GpuProperties>, TrainError> {
    Ok(lora_ops::device::gpu_properties(device)?)
}

/// Checks whether a device still works, without waiting for it.
///
/// # Errors
/// The device is lost: the GPU reported a permanent error. Only another process can use it again.
pub fn check_device(device: &ComputeDevice) -> Result<(), TrainError> {
    Ok(lora_ops::device::check(device)?)
}

/// Names what the bits of a result depend on besides the job: this build, and the instruction set
/// of its products or the GPU and its libraries. Ranks with different ids do not share a group.
pub fn numerics_id(device: &ComputeDevice) -> Result<String, TrainError> {
    Ok(format!("loractl {} {}", env!("CARGO_PKG_VERSION"), lora_ops::device::describe(device)?))
}
