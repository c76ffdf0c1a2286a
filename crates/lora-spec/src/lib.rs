//! A fine-tuning job in words and numbers: the job file and its checks, states and their transitions, what a checkpoint's
//! `config.json` and safetensors headers say, and the arithmetic of a plan. No tensors, no network.

mod adapter_spec;
mod device;
mod flops;
mod init_lora_weights;
mod job;
mod job_file;
mod keys;
mod memory;
mod model_config;
mod model_spec;
mod philox;
mod safetensors_index;
mod state;
mod target_modules;
mod units;

pub use adapter_spec::{AdapterSpec, TargetModules};
pub use device::{DeviceSpec, ParseDeviceError};
pub use flops::{attention_flops, row_flops};
pub use init_lora_weights::InitLoraWeights;
pub use job::{
    ActivationCheckpointing, DataSpec, JobSpec, LongRows, LrSchedulerType, Optim, TrainingSpec, WorkersSpec,
};
pub use job_file::{JobFile, JobFileError};
pub use keys::known_keys;
pub use memory::{
    CPU_LOGITS_PER_CHUNK, CPU_PANEL_ELEMENTS, EIGHT_BIT_BLOCK_SIZE, EIGHT_BIT_MIN_ELEMENTS,
    GPU_LOGITS_PER_CHUNK, GPU_PANEL_BYTES, GPU_PANEL_ROW_ALIGNMENT, GPU_WORKSPACE_BYTES,
    MAX_CONCURRENT_DECOMPOSITIONS, MemoryEstimate, MicroBatchShape, ModelFootprint, PAGED_WINDOW_ELEMENTS,
    TrainingWorkload, chunk_rows, gpu_panel_rows,
};
pub use model_config::{
    ActivationFunction, Architecture, LinearModule, ModelConfig, ModelConfigError, Rope, RopeScaling,
};
pub use model_spec::{BaseDtype, BaseFormat, BaseLayout, Loftq, ModelSpec, Quantization, QuantizationType};
pub use philox::Philox;
pub use safetensors_index::{
    FOUR_BIT_BLOCK_SIZES, FourBitState, FourBitType, SafetensorsError, SafetensorsIndex, StoredWeight,
    TensorEntry,
};
pub use state::JobState;
pub use units::format_bytes;

/// A field of a job and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// Dotted path, such as `training.learning_rate`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl FieldError {
    /// An error about `field`.
    pub fn new(field: &str, message: String) -> Self {
        Self { field: field.to_owned(), message }
    }
}
