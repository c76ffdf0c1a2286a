//! The rows of a job, and the check that the job fits in memory.

use std::path::Path;

use lora_collective::CancelToken;
use lora_data::{Dataset, MemoryRequirements, PlanError, Tokenizer};
use lora_model::ModelError;
use lora_spec::{JobSpec, MemoryLimit};

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

    /// Returns why the job with the base in the directory `base` does not fit within `limit`.
    /// `None` means that it fits. Does not read weights.
    pub fn too_large(
        &self,
        job: &JobSpec,
        base: &Path,
        limit: MemoryLimit,
    ) -> Result<Option<String>, TrainError> {
        let requirements = MemoryRequirements::new(job, base, &self.train).map_err(|error| match error {
            PlanError::Field(error) => error.into(),
            PlanError::Config(error) => ModelError::from(error).into(),
            PlanError::Safetensors(error) => ModelError::from(error).into(),
            PlanError::Data(error) => TrainError::from(error),
        })?;
        Ok(requirements.too_large(limit))
    }
}
