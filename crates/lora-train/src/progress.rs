//! How far a run has come. A checkpoint has this as JSON.

use lora_spec::TrainingSpec;
use serde::{Deserialize, Serialize};

use crate::early_stopping::BestEvaluation;
use crate::error::TrainError;
use crate::receipt::StepRecord;
use crate::trainer::TrainedStep;

/// Number of steps in a row with losses or gradients that are not finite, after which a job ends.
const NOT_FINITE_LIMIT: u64 = 10;

/// The state of a run, except its tensors.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Hash of everything that the job's bits depend on. A checkpoint with another identity is
    /// refused.
    identity: String,
    /// Number of completed steps.
    step: u64,
    /// AdamW's `t`: number of steps that changed the parameters. Only set in a checkpoint.
    updates: u64,
    /// Number of steps in a row whose losses or gradients were not finite.
    not_finite_in_a_row: u64,
    /// Whether the evaluation after the last completed step is still due.
    evaluation_due: bool,
    /// Whether training has ended.
    finished: bool,
    best: BestEvaluation,
    /// One record for each completed step.
    history: Vec<StepRecord>,
    /// Number of tokens seen so far, without padding. It follows from the number of steps, so a
    /// checkpoint does not have it.
    #[serde(skip)]
    num_tokens: u64,
}

impl Progress {
    /// Creates the progress of a job before its first step.
    pub(crate) fn new(identity: String) -> Self {
        Self { identity, ..Self::default() }
    }

    /// Returns the hash of everything that the job's bits depend on.
    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    /// Returns the number of completed steps.
    pub(crate) fn step(&self) -> u64 {
        self.step
    }

    /// Returns the optimizer's `t` of a checkpoint.
    pub(crate) fn updates(&self) -> u64 {
        self.updates
    }

    /// Returns the progress for a checkpoint whose optimizer has made `updates` steps.
    pub(crate) fn with_updates(&self, updates: u64) -> Self {
        Self { updates, ..self.clone() }
    }

    /// Returns the progress of a checkpoint with the number of tokens of its steps.
    pub(crate) fn with_num_tokens(self, num_tokens: u64) -> Self {
        Self { num_tokens, ..self }
    }

    /// Returns the number of tokens seen so far, without padding.
    pub(crate) fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// Returns whether the evaluation after the last completed step is still due.
    pub(crate) fn is_evaluation_due(&self) -> bool {
        self.evaluation_due
    }

    /// Returns whether training has ended.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished
    }

    /// Returns the best evaluation so far.
    pub(crate) fn best(&self) -> BestEvaluation {
        self.best
    }

    /// Returns the records of the completed steps.
    pub(crate) fn history(&self) -> &[StepRecord] {
        &self.history
    }

    /// Returns the mean loss of the steps from `first` to `last`, without those whose loss was not
    /// finite; NaN if there is no other.
    pub(crate) fn mean_loss(&self, first: u64, last: u64) -> f64 {
        let records = self.history.get(first as usize - 1..last as usize).unwrap_or_default();
        let losses: Vec<f64> = records.iter().filter_map(|record| record.loss).collect();
        losses.iter().sum::<f64>() / losses.len() as f64
    }

    /// Completes a step over `tokens` tokens, after which the parameters and moments have the hash
    /// `state`. If the step was not finite, its update was skipped, and a notice is returned.
    ///
    /// # Errors
    /// [`NOT_FINITE_LIMIT`] steps in a row were not finite, or all of the job's `total_steps`. The
    /// progress then does not change.
    pub(crate) fn complete_step(
        &mut self,
        trained: &TrainedStep,
        tokens: u64,
        state: &str,
        evaluation_due: bool,
        total_steps: u64,
    ) -> Result<Option<String>, TrainError> {
        let step = self.step + 1;
        let (not_finite_in_a_row, notice) = match &trained.not_finite {
            None => (0, None),
            Some(what) => {
                let notice = format!("step {step}: {what} is not finite; the step was skipped");
                (self.not_finite_in_a_row + 1, Some(notice))
            }
        };
        let limit = NOT_FINITE_LIMIT.min(total_steps);
        if let Some(what) = trained.not_finite.as_ref().filter(|_| not_finite_in_a_row >= limit) {
            let what = what.clone();
            return Err(TrainError::NotFinite { step, what, count: not_finite_in_a_row });
        }
        let finite = |number: f64| number.is_finite().then_some(number);
        self.history.push(StepRecord {
            step,
            loss: finite(trained.loss),
            grad_norm: finite(trained.grad_norm),
            state: state.to_owned(),
            eval_loss: None,
        });
        (self.step, self.not_finite_in_a_row, self.evaluation_due) =
            (step, not_finite_in_a_row, evaluation_due);
        self.num_tokens += tokens;
        Ok(notice)
    }

    /// Completes the evaluation that is due. `best` includes it.
    pub(crate) fn complete_evaluation(&mut self, best: BestEvaluation, loss: f64) {
        self.best = best;
        if let Some(record) = self.history.last_mut() {
            record.eval_loss = loss.is_finite().then_some(loss);
        }
        self.evaluation_due = false;
    }

    /// Ends training if all steps are completed, or if evaluations no longer improve.
    pub(crate) fn update_finished(&mut self, training: &TrainingSpec, total_steps: u64) {
        self.finished = self.step >= total_steps || self.best.patience_exhausted(training);
    }
}
