//! What a job needs: the memory of a worker, floating-point operations, and the plan of the whole
//! job. Everything is computed from the settings, `config.json`, safetensors headers and token
//! rows. No weights are read, and no tensors are used.
//!
//! The crate may depend on `lora-spec`, `lora-data` and `lora-collective`, so the coordinator can
//! use it. To read it, begin with [`Plan`] and [`MemoryRequirements`].

mod alternative;
mod error;
mod flops;
mod memory_estimate;
mod memory_requirements;
mod model_footprint;
mod notes;
mod plan;
mod plan_inputs;
mod serving_notes;
mod too_large;
mod training_workload;

pub use error::PlanError;
pub use flops::{attention_flops, row_flops};
pub use memory_estimate::{MemoryEstimate, PlanMemory};
pub use memory_requirements::MemoryRequirements;
pub use model_footprint::ModelFootprint;
pub use notes::data_notes;
pub use plan::{Plan, PlanData, PlanFile, PlanOptions, PlanRow};
pub use serving_notes::vllm_max_lora_rank;
pub use too_large::TooLarge;
pub use training_workload::{MicroBatchShape, TrainingWorkload};
