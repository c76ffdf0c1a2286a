//! A fine-tuning job in words and numbers: the job file and its checks, states and their transitions, what a checkpoint's
//! `config.json` and safetensors headers say, and the arithmetic of a plan. No tensors, no network.

mod adapter_spec;
mod checkpoint;
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
mod state;
mod target_modules;
mod units;

pub use adapter_spec::{AdapterSpec, TargetModules};
pub use checkpoint::{
    Checkpoint, CheckpointError, FOUR_BIT_BLOCKS, FourBitState, FourBitType, StoredWeight, TensorEntry,
};
pub use device::{Device, DeviceError};
pub use flops::{attention_flops, row_flops};
pub use init_lora_weights::InitLoraWeights;
pub use job::{
    ActivationCheckpointing, DataSpec, JobSpec, LongRows, Optim, Scheduler, TrainingSpec, WorkersSpec,
};
pub use job_file::{JobFile, JobFileError};
pub use keys::known_keys;
pub use memory::{
    CPU_LOGITS, CPU_PANEL, EIGHT_BIT_BLOCK, EIGHT_BIT_ELEMENTS, GPU_LOGITS, GPU_PANEL_ALIGNMENT,
    GPU_PANEL_BYTES, GPU_WORKSPACE, Held, INITIALIZED_AT_ONCE, Memory, MicroBatchShape, PAGED_WINDOW,
    Training, chunk_rows, gpu_panel_rows,
};
pub use model_config::{Activation, Architecture, ConfigError, LinearModule, ModelConfig, Rope, RopeScaling};
pub use model_spec::{BaseDtype, BaseForm, BaseFormat, Loftq, ModelSpec, Quantization, QuantizationType};
pub use philox::Philox;
pub use state::JobState;
pub use units::bytes_text;

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
