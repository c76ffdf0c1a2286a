//! What a run tells of itself and of its steps.

use serde::{Deserialize, Serialize};

/// Sizes of a run that people want to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFacts {
    /// Optimizer steps of the whole job.
    pub total_steps: u64,
    /// Optimizer steps of a pass over the data.
    pub steps_per_epoch: u64,
    /// Trained parameters.
    pub trainable_parameters: u64,
    /// Parameters of base and adapter.
    pub total_parameters: u64,
    /// Bytes of the adapter's parameters (f32).
    pub adapter_bytes: u64,
}

/// What a step did, as people see it; the same on every rank, and after a resume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Completed steps, this one included.
    pub step: u64,
    /// Mean loss a trained token, in nats; NaN where it was not finite.
    pub loss: f64,
    /// 2-norm of the mean gradient before clipping; NaN where the step was skipped.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Passes over the data after the step.
    pub epoch: f64,
    /// Tokens seen so far, padding not counted.
    pub num_tokens: u64,
    /// Mean evaluation loss a trained token, where the step was evaluated and it is finite.
    pub eval_loss: Option<f64>,
    /// Whether `logging_steps` (or an evaluation, or the end) asks for a row of metrics.
    pub logged: bool,
}

/// A completed step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Its numbers.
    pub metrics: StepMetrics,
    /// Whether `save_steps` asks for a checkpoint now.
    pub checkpoint_due: bool,
    /// What comes next.
    pub outcome: StepOutcome,
    /// Tokens of the step, over all ranks, padding not counted.
    pub tokens: u64,
    /// Bytes this rank sent in the step.
    pub reduced_bytes: u64,
    /// Something that people should know of, such as a skipped step.
    pub notice: Option<String>,
}

/// What comes after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepOutcome {
    /// The next step.
    Continue,
    /// A rank was asked to stop: all stop here alike.
    Stopped,
    /// Training has ended; the adapter can be exported.
    Finished,
}
