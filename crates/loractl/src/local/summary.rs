//! What a run came to.

use std::path::PathBuf;
use std::time::Duration;

use lora_proto::v1::{self, job_event};
use lora_spec::JobState;
use serde::Serialize;

use crate::output::{Table, bytes, count};

/// What a run came to. Unknown values are none, such as the loss of a job that made no step.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RunSummary {
    pub(crate) state: JobState,
    /// Why it failed.
    pub(crate) failure: Option<String>,
    pub(crate) steps: u64,
    pub(crate) total_steps: u64,
    /// Mean loss of the last step, in nats a trained token.
    pub(crate) loss: Option<f64>,
    /// Of the last evaluation.
    pub(crate) eval_loss: Option<f64>,
    pub(crate) trainable_parameters: u64,
    /// Base and adapter.
    pub(crate) total_parameters: u64,
    /// Bytes of `adapter_model.safetensors`.
    pub(crate) adapter_bytes: Option<u64>,
    pub(crate) workers: usize,
    /// Bytes that one worker sends for the gradients of a step, on the mean.
    pub(crate) all_reduced_bytes: Option<u64>,
    /// From the start of the processes to the end.
    pub(crate) seconds: f64,
    /// Of the steps of this run, without loading.
    pub(crate) tokens_per_second: Option<f64>,
    pub(crate) output_dir: PathBuf,
}

impl RunSummary {
    /// For people; values that are not known are left out.
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
        let percent = 100.0 * self.trainable_parameters as f64 / self.total_parameters.max(1) as f64;
        table.row("trainable parameters", format!("{} ({percent:.2} %)", count(self.trainable_parameters)));
        table.row("total parameters", count(self.total_parameters));
        if let Some(size) = self.adapter_bytes {
            table.row("adapter file", bytes(size));
        }
        table.row("workers", self.workers);
        if let Some(n) = self.all_reduced_bytes {
            table.row("all-reduced a step", format!("{} by a worker", bytes(n)));
        }
        table.row("time", format!("{:.1} s", self.seconds));
        if let Some(rate) = self.tokens_per_second {
            table.row("tokens/s", format!("{rate:.0}"));
        }
        let place = if self.state == JobState::Succeeded { "adapter" } else { "output directory" };
        table.row(place, self.output_dir.display());
        table
    }
}

/// Follows a job's events and sums them up.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    state: Option<JobState>,
    failure: Option<v1::Failure>,
    facts: v1::RunFacts,
    assigned: bool,
    completed_steps: u64,
    loss: Option<f64>,
    eval_loss: Option<f64>,
    /// Steps of this run, and the bytes they reduced.
    steps: u64,
    reduced_bytes: u64,
    first: Option<Sample>,
    last: Option<Sample>,
}

/// A finished step, and when it was.
#[derive(Debug, Clone, Copy)]
struct Sample {
    step: u64,
    tokens: u64,
    /// Since 1970.
    seconds: f64,
}

impl Tally {
    /// Takes the next event.
    pub(crate) fn take(&mut self, event: &v1::JobEvent) {
        match &event.kind {
            Some(job_event::Kind::StateChanged(change)) => {
                self.state = JobState::ALL.into_iter().find(|state| state.name() == change.state);
                self.failure.clone_from(&change.failure);
            }
            Some(job_event::Kind::Assigned(_)) => self.assigned = true,
            Some(job_event::Kind::Prepared(prepared)) => {
                self.facts = prepared.facts.unwrap_or_default();
                self.completed_steps = prepared.completed_steps;
            }
            Some(job_event::Kind::StepFinished(step)) => {
                self.steps += 1;
                self.reduced_bytes += step.reduced_bytes;
                if let Some(metrics) = step.metrics {
                    self.completed_steps = metrics.step;
                    self.loss = Some(metrics.loss);
                    self.eval_loss = metrics.eval_loss.or(self.eval_loss);
                    let sample = event.time.map(|time| Sample {
                        step: metrics.step,
                        tokens: metrics.num_tokens,
                        seconds: time.seconds as f64 + f64::from(time.nanos) * 1e-9,
                    });
                    self.first = self.first.or(sample);
                    self.last = sample;
                }
            }
            _ => {}
        }
    }

    /// Whether the job is over or paused.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.state.is_some_and(|state| state.is_final() || state == JobState::Paused)
    }

    /// Whether workers have been given the job.
    pub(crate) fn assigned(&self) -> bool {
        self.assigned
    }

    /// Steps of the whole job.
    pub(crate) fn total_steps(&self) -> u64 {
        self.facts.total_steps
    }

    /// Of the last evaluation.
    pub(crate) fn eval_loss(&self) -> Option<f64> {
        self.eval_loss
    }

    /// Tokens a second since the first step that was seen; none before the second one.
    pub(crate) fn tokens_per_second(&self) -> Option<f64> {
        let (first, last, seconds) = self.span()?;
        Some(last.tokens.saturating_sub(first.tokens) as f64 / seconds)
    }

    /// Seconds until the last step at the pace of this run.
    pub(crate) fn seconds_left(&self) -> Option<f64> {
        let (first, last, seconds) = self.span()?;
        let pace = seconds / last.step.saturating_sub(first.step).max(1) as f64;
        Some(pace * self.facts.total_steps.saturating_sub(last.step) as f64)
    }

    fn span(&self) -> Option<(Sample, Sample, f64)> {
        let (first, last) = self.first.zip(self.last)?;
        let seconds = last.seconds - first.seconds;
        (seconds > 0.0).then_some((first, last, seconds))
    }

    /// The summary, now that the run is over.
    pub(crate) fn summary(self, workers: usize, output_dir: PathBuf, elapsed: Duration) -> RunSummary {
        let adapter = output_dir.join("adapter_model.safetensors");
        let state = self.state.unwrap_or(JobState::Validating);
        RunSummary {
            state,
            failure: self.failure.as_ref().map(|failure| describe(failure, self.facts.total_steps > 0)),
            steps: self.completed_steps,
            total_steps: self.facts.total_steps,
            loss: self.loss,
            eval_loss: self.eval_loss,
            trainable_parameters: self.facts.trainable_parameters,
            total_parameters: self.facts.total_parameters,
            adapter_bytes: if state == JobState::Succeeded {
                adapter.metadata().map(|meta| meta.len()).ok()
            } else {
                None
            },
            workers,
            all_reduced_bytes: self.reduced_bytes.checked_div(self.steps),
            seconds: elapsed.as_secs_f64(),
            tokens_per_second: self.tokens_per_second(),
            output_dir,
        }
    }
}

/// A failure in one sentence; `training`: the job had begun to train.
fn describe(failure: &v1::Failure, training: bool) -> String {
    let v1::Failure { worker, rank, completed_steps, cause } = failure;
    match (worker, rank) {
        (Some(worker), Some(rank)) if training => {
            format!("{worker} (rank {rank}), after step {completed_steps}: {cause}")
        }
        (Some(worker), _) => format!("{worker}: {cause}"),
        (None, _) => cause.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn step(step: u64, seconds: u64, eval_loss: Option<f64>) -> v1::JobEvent {
        let metrics =
            v1::StepMetrics { step, loss: 2.0, num_tokens: 100 * step, eval_loss, ..Default::default() };
        let kind = v1::StepFinished { metrics: Some(metrics), logged: true, reduced_bytes: 1 << 20 };
        v1::JobEvent {
            number: step,
            time: Some((SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).into()),
            kind: Some(job_event::Kind::StepFinished(kind)),
        }
    }

    #[test]
    fn the_rate_counts_tokens_between_the_first_and_the_last_step() {
        let mut tally = Tally::default();
        tally.take(&step(5, 1000, None));
        assert_eq!(tally.tokens_per_second(), None);
        tally.take(&step(6, 1001, Some(0.5)));
        tally.take(&step(7, 1004, None));
        assert_eq!(tally.tokens_per_second(), Some(50.0));
        let summary = tally.summary(2, "/out".into(), Duration::from_secs(9));
        assert_eq!((summary.steps, summary.eval_loss, summary.loss), (7, Some(0.5), Some(2.0)));
        assert_eq!(summary.all_reduced_bytes, Some(1 << 20));
    }

    #[test]
    fn the_table_leaves_out_what_is_not_known() {
        let summary = Tally::default().summary(1, "/out".into(), Duration::ZERO);
        let table = summary.table().to_string();
        assert!(!table.contains("loss") && !table.contains("tokens/s"), "{table}");
    }
}
