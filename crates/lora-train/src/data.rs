//! The rows of a job, and the check that the job fits in memory.

use std::path::Path;

use lora_collective::CancelToken;
use lora_data::{Dataset, Tokenizer};
use lora_model::ModelError;
use lora_plan::MemoryRequirements;
use lora_spec::{DeviceMemory, JobSpec, ModelConfig, SafetensorsIndex};

use crate::error::TrainError;
use crate::inputs::RunInputs;

/// The tokenized rows of a job.
pub struct RunData {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) train: Dataset,
    pub(crate) eval: Option<Dataset>,
}

impl RunData {
    /// Reads the rows with the tokenizer in the directory `base`. `cancel` takes effect between two
    /// files.
    pub fn read(
        job: &JobSpec,
        inputs: &RunInputs,
        base: &Path,
        cancel: &CancelToken,
    ) -> Result<Self, TrainError> {
        let check = || if cancel.is_cancelled() { Err(TrainError::Cancelled) } else { Ok(()) };
        job.check()?;
        check()?;
        let tokenizer = Tokenizer::load(base)?;
        let read = |path| {
            check()?;
            Ok::<_, TrainError>(Dataset::read(path, &tokenizer, job.data.max_length, job.data.long_rows)?)
        };
        let train = read(&inputs.train)?;
        let eval = inputs.eval.as_deref().map(read).transpose()?;
        check()?;
        Ok(Self { tokenizer, train, eval })
    }

    /// Checks that the job with the base in the directory `base` fits in `memory`. Does not read
    /// weights.
    ///
    /// # Errors
    /// The job does not fit, or the base is invalid.
    pub fn check_memory(&self, job: &JobSpec, base: &Path, memory: DeviceMemory) -> Result<(), TrainError> {
        let model = ModelConfig::read(base).map_err(ModelError::from)?;
        let index = SafetensorsIndex::open(base).map_err(ModelError::from)?;
        MemoryRequirements::new(job, &model, &index, &self.train)?.fits(memory)?;
        Ok(())
    }
}
