//! Sizes of a run, and metrics of its steps.

use lora_spec::{ExportedAdapter, RunFacts, StepMetrics};

use crate::v1;

impl From<&RunFacts> for v1::RunFacts {
    fn from(facts: &RunFacts) -> Self {
        let RunFacts { total_steps, steps_per_epoch, trainable_parameters, total_parameters, adapter_bytes } =
            *facts;
        Self { total_steps, steps_per_epoch, trainable_parameters, total_parameters, adapter_bytes }
    }
}

impl From<ExportedAdapter> for v1::ExportedAdapter {
    fn from(adapter: ExportedAdapter) -> Self {
        let ExportedAdapter { step, eval_loss, stopped_early } = adapter;
        Self { step, eval_loss, stopped_early }
    }
}

impl From<&StepMetrics> for v1::StepMetrics {
    /// Converts all metrics. `logged` is a field of the step's report.
    fn from(metrics: &StepMetrics) -> Self {
        let StepMetrics { step, loss, grad_norm, learning_rate, epoch, num_tokens, eval_loss, logged: _ } =
            *metrics;
        Self { step, loss, grad_norm, learning_rate, epoch, num_tokens, eval_loss }
    }
}
