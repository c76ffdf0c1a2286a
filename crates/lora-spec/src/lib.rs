//! A fine-tuning job as data: the job file and its checks, the states and their transitions,
//! `config.json` and the safetensors headers of a base, the memory of a worker, and the buffer
//! sizes that the engine and the plan share. This crate uses no tensors and no network.
//!
//! The crate depends on no other crate of the workspace. To read it, begin with [`JobSpec`] and
//! [`JobFile`].

mod adapter_spec;
mod block_config;
mod buffer_sizes;
mod data_spec;
mod device;
mod device_memory;
pub mod file_names;
mod foreign_values;
mod git_lfs;
mod init_lora_weights;
mod job;
mod job_file;
mod keys;
mod micro_batch;
mod model_config;
mod model_spec;
mod philox;
mod range;
mod row_format;
mod run;
mod safetensors_index;
mod source;
mod state;
mod target_modules;
mod train_files;
mod training_spec;
mod units;
mod unsupported_keys;
mod workers_spec;

pub use adapter_spec::AdapterSpec;
pub use block_config::{
    AttentionConfig, BlockConfig, LayerInputConfig, LinearModule, MlpConfig, NormModule,
    PerLayerEmbeddingConfig,
};
pub use buffer_sizes::{
    CPU_LOGITS_PER_CHUNK, CPU_PANEL_ELEMENTS, EIGHT_BIT_BLOCK_SIZE, EIGHT_BIT_MIN_ELEMENTS,
    GPU_LOGITS_PER_CHUNK, GPU_PANEL_BYTES, GPU_PANEL_ROW_ALIGNMENT, GPU_WORKSPACE_BYTES,
    MAX_CONCURRENT_DECOMPOSITIONS, MAX_MMA_HEAD_DIM, PAGED_WINDOW_ELEMENTS, chunk_rows, gpu_panel_rows,
};
pub use data_spec::{DataSpec, LongRows, TEMPLATE_VARIABLES};
pub use device::{DeviceSpec, ParseDeviceError};
pub use device_memory::{DeviceKind, DeviceMemory};
pub use git_lfs::{GIT_LFS_POINTER, is_git_lfs_pointer};
pub use init_lora_weights::InitLoraWeights;
pub use job::JobSpec;
pub use job_file::{JobFile, JobFileError};
pub use keys::known_keys;
pub use micro_batch::{Document, MicroBatch};
pub use model_config::{
    ActivationFunction, Architecture, LayerConfig, LayerRope, MlpModules, ModelConfig, ModelConfigError,
    NormKind, NormPlaces, PositionScaling, QkNorm, Rope, RopeScaling,
};
pub use model_spec::{BaseDtype, BaseFormat, BaseLayout, Loftq, ModelSpec, Quantization, QuantizationType};
pub use philox::Philox;
pub use row_format::RowFormat;
pub use run::{ExportedAdapter, RunFacts, StepMetrics};
pub use safetensors_index::{
    FOUR_BIT_BLOCK_SIZES, FourBitState, FourBitType, SafetensorsError, SafetensorsIndex, StoredWeight,
    TensorEntry,
};
pub use source::{JobFiles, SourceDir, SourceFile};
pub use state::JobState;
pub use target_modules::TargetModules;
pub use train_files::TrainFiles;
pub use training_spec::{ActivationCheckpointing, LrSchedulerType, Optim, TrainingSpec};
pub use units::format_bytes;
pub use workers_spec::WorkersSpec;

/// An error about a field of a job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// Dotted path, such as `training.learning_rate`.
    pub field: String,
    /// Why the field is invalid, and what would be right.
    pub message: String,
}

impl FieldError {
    /// Creates an error about `field`.
    pub fn new(field: &str, message: String) -> Self {
        Self { field: field.to_owned(), message }
    }
}
