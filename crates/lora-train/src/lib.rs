//! The training run of a job on one rank: steps whose results do not depend on the number of ranks,
//! evaluation, checkpoints that resume exactly, and the export of a verified adapter with its
//! receipt.
//!
//! Invariants:
//! - A step's global batch is a pure function of (dataset, seed, step). The number of ranks decides
//!   only which rank computes a micro-batch.
//! - Sums over micro-batches follow one canonical tree ([`lora_collective::tree`]).
//! - Parameters and moments change only in [`Run::step`], together, after the whole reduction has
//!   arrived. When a group breaks, its members therefore have the state after the same step or
//!   after the step before.

mod checkpoint;
mod data;
mod early_stopping;
mod engine;
mod error;
mod export;
mod gradient_reducer;
mod inputs;
mod lr_schedule;
mod metrics;
mod moments;
mod partition;
mod probe;
mod process_group;
mod receipt;
mod run;
mod step;
mod step_sync;
mod throughput;
mod verify;

pub use data::RunData;
pub use engine::{AccumulatedGradients, Engine, GradientAccumulation, LossSums, ReducedGradients};
pub use error::TrainError;
pub use export::ResultFile;
pub use inputs::{RunInputs, load_adapter};
pub use lora_ops::device::{DeviceMemory, GpuProperties, gpus};
pub use lr_schedule::learning_rate;
pub use metrics::{RunFacts, StepMetrics, StepOutcome, StepReport};
pub use partition::Partition;
pub use probe::{AllReduceMeasurement, DeviceMeasurement, measure_all_reduce, measure_device};
pub use process_group::ProcessGroup;
pub use receipt::{FileHash, Receipt, StepRecord};
pub use run::Run;
pub use throughput::{throughput_memory, training_throughput};
pub use verify::{InputPaths, Verification, verify};

/// A device that was opened with [`open_device`].
pub type ComputeDevice = candle_core::Device;

/// Opens the device that a worker computes on. A process calls it once.
///
/// # Errors
/// The GPU does not exist or cannot be used, or the build has no CUDA.
pub fn open_device(device: lora_spec::DeviceSpec) -> Result<ComputeDevice, TrainError> {
    Ok(lora_ops::device::open(device)?)
}

/// Returns the memory of a GPU; `None` for the CPU.
pub fn device_memory(device: &ComputeDevice) -> Result<Option<DeviceMemory>, TrainError> {
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
