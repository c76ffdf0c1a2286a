//! Sizes of a run, and metrics of its steps.

use serde::{Deserialize, Serialize};

/// Sizes of a run, for display.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFacts {
    /// Number of optimizer steps of the whole job.
    pub total_steps: u64,
    /// Number of optimizer steps of one pass over the data.
    pub steps_per_epoch: u64,
    /// Number of trained parameters.
    pub trainable_parameters: u64,
    /// Number of parameters of base and adapter.
    pub total_parameters: u64,
    /// Size of the adapter's parameters (f32) in bytes.
    pub adapter_bytes: u64,
}

/// The adapter that a run exports.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExportedAdapter {
    /// The step whose parameters it has.
    pub step: u64,
    /// Loss of the evaluation after this step, in nats per trained token, if one followed it.
    pub eval_loss: Option<f64>,
    /// Whether training ended before its last step because the evaluation loss did not improve.
    pub stopped_early: bool,
}

/// The metrics of a step. They are the same on every rank, and after a resume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Number of completed steps, including this one.
    pub step: u64,
    /// Mean loss per trained token, in nats; NaN if it was not finite. In a logged step, it is the
    /// mean of the steps after the previous logged step, without those that were not finite.
    pub loss: f64,
    /// 2-norm of the mean gradient before clipping; NaN if the step was skipped.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Number of passes over the data after the step.
    pub epoch: f64,
    /// Number of tokens seen so far, without padding.
    pub num_tokens: u64,
    /// Mean evaluation loss per trained token, if an evaluation followed the step and its loss is
    /// finite.
    pub eval_loss: Option<f64>,
    /// Whether the step is logged, because of `logging_steps`, an evaluation, or the end of
    /// training.
    pub logged: bool,
}
