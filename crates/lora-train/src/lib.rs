//! The training run of a job on one rank: steps whose results do not depend on the number of ranks,
//! evaluation, checkpoints that resume exactly, and the export of a verified adapter with its
//! receipt.
//!
//! Invariants:
//! - A step's global batch is a pure function of (dataset, seed, step). The number of ranks decides
//!   only which rank computes a micro-batch.
//! - Sums over micro-batches follow one canonical tree ([`lora_collective::tree`]).
//! - Parameters and moments change together: in [`Run::step`] after the whole reduction has
//!   arrived, and when a state is restored ([`Run::restore`], [`Run::join`]). When a group breaks,
//!   its members therefore have the state after the same step or after the step before.
//!
//! The crate may not know gRPC, daemons or where files come from. To read it, begin with
//! [`Run::step`] for a job, and with [`GradientAccumulation`] for the parts of a step.

mod checkpoint;
mod data;
mod device;
mod early_stopping;
mod engine;
mod error;
mod evaluator;
mod export;
mod gradient_reducer;
mod inputs;
mod logit_difference;
mod lr_schedule;
mod partition;
mod probe;
mod process_group;
mod progress;
mod receipt;
mod run;
mod step_report;
mod step_sync;
mod throughput;
mod trainer;
mod training_rows;
mod verify;

pub use data::RunData;
pub use device::{
    ComputeDevice, GpuProperties, MemoryUsage, check_device, gpu_properties, gpus, memory_usage, numerics_id,
    open_device,
};
pub use engine::{AccumulatedGradients, Engine, GradientAccumulation, LossSums, ReducedGradients};
pub use error::TrainError;
pub use export::ResultFile;
pub use inputs::load_adapter;
pub use logit_difference::LogitDifference;
pub use lr_schedule::learning_rate;
pub use partition::Partition;
pub use probe::{AllReduceMeasurement, DeviceMeasurement, measure_all_reduce, measure_device};
pub use process_group::ProcessGroup;
pub use receipt::{FileHash, Receipt, StepRecord};
pub use run::Run;
pub use step_report::{StepOutcome, StepReport};
pub use throughput::{throughput_memory, training_throughput};
pub use verify::{InputPaths, Verification, verify};
