//! The rows of a job, and the check that the job fits in memory.

use lora_collective::CancelToken;
use lora_data::{Dataset, TokenCache, TokenFiles, Tokenizer};
use lora_model::ModelError;
use lora_plan::MemoryRequirements;
use lora_spec::{DeviceMemory, JobFiles, JobSpec, ModelConfig, SafetensorsIndex, SourceDir};

use crate::error::TrainError;

/// The tokenized rows of a job.
pub struct RunData {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) train: Dataset,
    pub(crate) eval: Option<Dataset>,
}

impl RunData {
    /// Reads the rows with the base's tokenizer. `cancel` takes effect between two files.
    /// The tokens are looked up in `cache`, and kept there for the next time.
    pub fn read(
        job: &JobSpec,
        files: &JobFiles,
        cache: Option<&TokenCache>,
        cancel: &CancelToken,
    ) -> Result<Self, TrainError> {
        let check = || if cancel.is_cancelled() { Err(TrainError::Cancelled) } else { Ok(()) };
        job.check()?;
        check()?;
        let model = ModelConfig::read(&files.base).map_err(ModelError::from)?;
        let tokenizer = Tokenizer::for_job(&files.base, &job.data)?.with_vocab_size(model.vocab_size);
        let token_files = TokenFiles { given: files.tokens.as_ref(), cache, progress: None };
        let train = Dataset::read_all(&files.train, &tokenizer, &job.data, token_files)?;
        check()?;
        let eval =
            files.eval.as_ref().map(|file| Dataset::read_with(file, &tokenizer, &job.data, token_files));
        let eval = eval.transpose()?;
        check()?;
        Ok(Self { tokenizer, train, eval })
    }

    /// Checks that the job with `base` fits in `memory`. Does not read
    /// weights.
    ///
    /// # Errors
    /// The job does not fit, or the base is invalid.
    pub fn check_memory(
        &self,
        job: &JobSpec,
        base: &SourceDir,
        memory: DeviceMemory,
    ) -> Result<(), TrainError> {
        let mut model = ModelConfig::read(base).map_err(ModelError::from)?;
        let index = SafetensorsIndex::open(base).map_err(ModelError::from)?;
        index.untie_head(&mut model).map_err(ModelError::from)?;
        MemoryRequirements::new(job, &model, &index, &self.train)?.fits(memory)?;
        Ok(())
    }
}
