//! The report of a step.

use lora_spec::StepMetrics;

/// A completed step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// The step's metrics.
    pub metrics: StepMetrics,
    /// Whether a checkpoint is due, because of `save_steps`.
    pub checkpoint_due: bool,
    /// What follows the step.
    pub outcome: StepOutcome,
    /// Number of tokens of the step on all ranks, without padding.
    pub tokens: u64,
    /// Bytes that this rank sent in the step.
    pub reduced_bytes: u64,
    /// A message for users, for example about a skipped step.
    pub notice: Option<String>,
}

/// What follows a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepOutcome {
    /// The next step follows.
    Continue,
    /// A rank was asked to stop; all ranks stop after this step.
    Stopped,
    /// Training has ended; the adapter can be exported.
    Finished,
}
