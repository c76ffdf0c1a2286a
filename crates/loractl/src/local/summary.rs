//! The summary of a run.

use std::path::PathBuf;
use std::time::Duration;

use lora_spec::JobState;
use lora_spec::file_names::ADAPTER_WEIGHTS;
use serde::Serialize;

use crate::output::{ExportedView, Table, bytes, count, failure_text};
use crate::stats::JobStats;

/// The summary of a run. Unknown values, such as the loss of a job without a step, are `None`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RunSummary {
    pub(crate) state: JobState,
    /// Cause of the failure.
    pub(crate) failure: Option<String>,
    pub(crate) steps: u64,
    pub(crate) total_steps: u64,
    /// Mean loss of the last row of `metrics.jsonl`, in nats per trained token.
    pub(crate) loss: Option<f64>,
    /// Loss of the last evaluation.
    pub(crate) eval_loss: Option<f64>,
    /// The adapter in the result.
    pub(crate) exported: Option<ExportedView>,
    pub(crate) trainable_parameters: u64,
    /// Parameters of base and adapter.
    pub(crate) total_parameters: u64,
    /// Size of `adapter_model.safetensors` in bytes.
    pub(crate) adapter_bytes: Option<u64>,
    pub(crate) workers: usize,
    /// Device of the workers: `cpu` or `cuda`.
    pub(crate) device: &'static str,
    /// Mean number of bytes that one worker sends for the gradients of a step.
    pub(crate) all_reduced_bytes: Option<u64>,
    /// Seconds from the start of the run to its end.
    pub(crate) seconds: f64,
    /// Speed of the steps of this run, without the time for loading.
    pub(crate) tokens_per_second: Option<f64>,
    pub(crate) output_dir: PathBuf,
}

impl RunSummary {
    /// Creates the summary of a run that has ended.
    pub(crate) fn new(
        stats: &JobStats,
        workers: usize,
        device: &'static str,
        output_dir: PathBuf,
        elapsed: Duration,
    ) -> Self {
        let facts = stats.facts().unwrap_or_default();
        let state = stats.state().unwrap_or(JobState::Validating);
        let adapter = output_dir.join(ADAPTER_WEIGHTS);
        let succeeded = state == JobState::Succeeded;
        Self {
            state,
            failure: stats.failure().map(failure_text),
            steps: stats.completed_steps(),
            total_steps: facts.total_steps,
            exported: stats.exported().map(Into::into),
            loss: stats.metrics().map(|metrics| metrics.loss),
            eval_loss: stats.eval_loss(),
            trainable_parameters: facts.trainable_parameters,
            total_parameters: facts.total_parameters,
            adapter_bytes: adapter.metadata().map(|meta| meta.len()).ok().filter(|_| succeeded),
            workers,
            device,
            all_reduced_bytes: stats.reduced_bytes(),
            seconds: elapsed.as_secs_f64(),
            tokens_per_second: stats.tokens_per_second(),
            output_dir,
        }
    }

    /// The summary as text, without unknown values.
    pub(crate) fn table(&self) -> Table {
        let mut table = Table::new();
        table.row("state", self.state.name());
        table.row("steps", format!("{} of {}", self.steps, self.total_steps));
        if let Some(loss) = self.loss {
            table.row("loss", format!("{loss:.4}"));
        }
        if let Some(loss) = self.eval_loss {
            table.row("eval loss", format!("{loss:.4}"));
        }
        if let Some(exported) = &self.exported {
            exported.rows(&mut table, self.steps);
        }
        let percent = 100.0 * self.trainable_parameters as f64 / self.total_parameters.max(1) as f64;
        table.row("trainable parameters", format!("{} ({percent:.2} %)", count(self.trainable_parameters)));
        table.row("total parameters", count(self.total_parameters));
        if let Some(size) = self.adapter_bytes {
            table.row("adapter file", bytes(size));
        }
        table.row("workers", self.workers);
        table.row("device", self.device);
        if let Some(n) = self.all_reduced_bytes {
            table.row("all-reduced a step", format!("{} by a worker", bytes(n)));
        }
        table.row("time", format!("{:.1} s", self.seconds));
        if let Some(rate) = self.tokens_per_second {
            table.row("tokens/s", format!("{rate:.0}"));
        }
        let name = if self.state == JobState::Succeeded { "adapter" } else { "output directory" };
        table.row(name, self.output_dir.display());
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_omits_unknown_values() {
        let summary = RunSummary::new(&JobStats::default(), 1, "cpu", "/out".into(), Duration::ZERO);
        let table = summary.table().to_string();
        assert!(!table.contains("loss") && !table.contains("tokens/s"), "{table}");
    }
}
