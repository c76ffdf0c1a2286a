//! Evaluations of a run, and the parameters of the best one.

use lora_data::{Dataset, MicroBatchRows, RowLayout, collate};
use lora_ops::transfer::to_vec;
use lora_spec::{JobSpec, TrainingSpec};

use crate::error::TrainError;
use crate::progress::Progress;
use crate::trainer::Trainer;

/// The evaluation rows of a job, if it has any, and the best parameters.
pub(crate) struct Evaluator {
    dataset: Option<Dataset>,
    micro_batches: Vec<MicroBatchRows>,
    training: TrainingSpec,
    total_steps: u64,
    /// Parameters at the best evaluation, if the job exports them.
    best_params: Option<Vec<f32>>,
}

impl Evaluator {
    /// Creates the evaluator of a run of `total_steps` steps.
    pub(crate) fn new(job: &JobSpec, dataset: Option<Dataset>, total_steps: u64) -> Self {
        let layout = RowLayout::for_job(job);
        let micro_batches =
            dataset.as_ref().map(|dataset| layout.eval_micro_batches(&dataset.lengths())).unwrap_or_default();
        Self { dataset, micro_batches, training: job.training.clone(), total_steps, best_params: None }
    }

    /// Returns the rows, if there are any.
    pub(crate) fn dataset(&self) -> Option<&Dataset> {
        self.dataset.as_ref()
    }

    /// Returns the SHA-256 of the file.
    pub(crate) fn sha256(&self) -> Option<&str> {
        self.dataset.as_ref().map(|dataset| dataset.sha256.as_str())
    }

    /// Returns the parameters at the best evaluation, if the job exports them.
    pub(crate) fn best_params(&self) -> Option<&[f32]> {
        self.best_params.as_deref()
    }

    /// Replaces the parameters at the best evaluation by those of a checkpoint.
    pub(crate) fn restore_best_params(&mut self, best_params: Option<Vec<f32>>) {
        self.best_params = best_params;
    }

    /// Returns whether an evaluation follows the step.
    pub(crate) fn is_due_after(&self, step: u64) -> bool {
        let due = step >= self.total_steps || step.is_multiple_of(self.training.eval_steps);
        self.dataset.is_some() && due
    }

    /// Runs the evaluation after the last completed step.
    pub(crate) fn evaluate(
        &mut self,
        trainer: &mut Trainer,
        progress: &mut Progress,
    ) -> Result<(), TrainError> {
        let loss = self.loss(trainer)?;
        let mut best = progress.best();
        if best.observe(&self.training, progress.step(), loss) && self.training.load_best_model_at_end {
            self.best_params = Some(to_vec(trainer.engine().adapter().params())?);
        }
        progress.complete_evaluation(best, loss);
        Ok(())
    }

    /// Returns the mean loss per trained token.
    fn loss(&self, trainer: &mut Trainer) -> Result<f64, TrainError> {
        let Some(dataset) = &self.dataset else { return Ok(f64::NAN) };
        trainer.mean_loss(self.micro_batches.len(), |index| collate(dataset, &self.micro_batches[index]))
    }
}
