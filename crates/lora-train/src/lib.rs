//! One training run of one rank: steps whose results do not depend on the number of ranks, evaluation, checkpoints that
//! resume exactly, and the export of a verified adapter with its receipt.
//!
//! Invariants:
//! - A step's global batch is a pure function of (dataset, seed, step); ranks decide only who computes a micro-batch.
//! - Sums over micro-batches follow one canonical tree ([`lora_collective::tree`]).
//! - Parameters and moments change only in [`Run::step`], after the whole reduction has arrived, and never by halves:
//!   when a group breaks, its members hold the state after the same step or after the one before.

mod checkpoint;
mod data;
mod early_stopping;
mod engine;
mod error;
mod export;
mod inputs;
mod lr_schedule;
mod metrics;
mod moments;
mod probe;
mod process_group;
mod receipt;
mod run;
mod step;
mod step_sync;
mod throughput;
mod verify;

pub use data::RunData;
pub use engine::{Engine, LossSums};
pub use error::TrainError;
pub use export::ResultFile;
pub use inputs::{RunInputs, load_adapter};
pub use lora_ops::device::DeviceMemory;
pub use lr_schedule::learning_rate;
pub use metrics::{RunFacts, StepMetrics, StepOutcome, StepReport};
pub use probe::{AllReduceMeasurement, DeviceMeasurement, measure_all_reduce, measure_device};
pub use process_group::{Partition, ProcessGroup};
pub use receipt::{FileHash, Receipt, StepRecord};
pub use run::Run;
pub use throughput::{throughput_memory, training_throughput};
pub use verify::{InputPaths, Verification, verify};

/// A device that was opened with [`open_device`].
pub type ComputeDevice = candle_core::Device;

/// Opens the device that a worker computes on, once a process.
///
/// # Errors
/// A GPU that is not there or cannot be used, or a build without CUDA.
pub fn open_device(device: lora_spec::DeviceSpec) -> Result<ComputeDevice, TrainError> {
    Ok(lora_ops::device::open(device)?)
}

/// Memory of a GPU; `None` for the CPU.
pub fn device_memory(device: &ComputeDevice) -> Result<Option<DeviceMemory>, TrainError> {
    Ok(lora_ops::device::memory(device)?)
}

/// Asks a device whether it still works, without waiting for it.
///
/// # Errors
/// It is lost: a GPU that reported an error which does not go away. Only another process can use it again.
pub fn check_device(device: &ComputeDevice) -> Result<(), TrainError> {
    Ok(lora_ops::device::check(device)?)
}

/// What the bits of a result depend on beside the job: this build, and the instruction set of its products or the GPU and its
/// libraries. Ranks with different ones do not share a group.
pub fn numerics_id(device: &ComputeDevice) -> Result<String, TrainError> {
    Ok(format!("loractl {} {}", env!("CARGO_PKG_VERSION"), lora_ops::device::describe(device)?))
}
