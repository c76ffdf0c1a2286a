//! Statistics of a job, computed from its events and steps.

use lora_proto::v1::{self, StepMetrics, job_event};
use lora_spec::JobState;
use prost_types::Timestamp;

use crate::job_watch::WatchItem;

/// Statistics of a watched job.
#[derive(Debug, Default)]
pub(crate) struct JobStats {
    state: Option<JobState>,
    failure: Option<v1::Failure>,
    facts: Option<v1::RunFacts>,
    metrics: Option<StepMetrics>,
    completed_steps: u64,
    eval_loss: Option<f64>,
    exported: Option<v1::ExportedAdapter>,
    /// Number of received steps, and the bytes that rank 0 sent in them.
    steps: u64,
    reduced_bytes: u64,
    /// The first and the last step that were received of the current group of workers.
    first: Option<StepSample>,
    last: Option<StepSample>,
}

/// A finished step and its time.
#[derive(Debug, Clone, Copy)]
struct StepSample {
    step: u64,
    tokens: u64,
    /// Seconds since 1970.
    seconds: f64,
}

impl JobStats {
    /// Creates the statistics of a job when watching begins.
    pub(crate) fn from_job(job: &v1::Job) -> Self {
        Self {
            state: JobState::from_name(&job.state),
            failure: job.failure.clone(),
            facts: job.facts,
            metrics: job.metrics,
            completed_steps: job.completed_steps,
            eval_loss: job.metrics.and_then(|metrics| metrics.eval_loss),
            exported: job.exported,
            ..Self::default()
        }
    }

    /// Adds a received event or step.
    pub(crate) fn update(&mut self, item: &WatchItem) {
        match item {
            WatchItem::Event(event) => self.take_event(event),
            WatchItem::Step(step) => self.take_step(step),
            WatchItem::Note(_) => {}
        }
    }

    fn take_event(&mut self, event: &v1::JobEvent) {
        match &event.kind {
            Some(job_event::Kind::StateChanged(change)) => {
                self.state = JobState::from_name(&change.state);
                self.failure.clone_from(&change.failure);
            }
            // The workers did not train between the last step of the previous group and the first
            // of this one.
            Some(job_event::Kind::Assigned(_)) => (self.first, self.last) = (None, None),
            Some(job_event::Kind::ResultSaved(saved)) => self.exported = saved.exported,
            Some(job_event::Kind::Prepared(prepared)) => self.facts = prepared.facts.or(self.facts),
            _ => {}
        }
    }

    fn take_step(&mut self, step: &v1::StepReport) {
        self.steps += 1;
        self.reduced_bytes += step.reduced_bytes;
        let Some(metrics) = step.metrics else { return };
        self.completed_steps = self.completed_steps.max(metrics.step);
        self.eval_loss = metrics.eval_loss.or(self.eval_loss);
        self.metrics = Some(metrics);
        let Some(seconds) = step.time.as_ref().map(seconds) else { return };
        let sample = StepSample { step: metrics.step, tokens: metrics.num_tokens, seconds };
        self.first = self.first.or(Some(sample));
        self.last = Some(sample);
    }

    /// The newest state; `None` before one is known.
    pub(crate) fn state(&self) -> Option<JobState> {
        self.state
    }

    pub(crate) fn failure(&self) -> Option<&v1::Failure> {
        self.failure.as_ref()
    }

    /// `None` until the data has been read.
    pub(crate) fn facts(&self) -> Option<v1::RunFacts> {
        self.facts
    }

    pub(crate) fn completed_steps(&self) -> u64 {
        self.completed_steps
    }

    /// Metrics of the newest step.
    pub(crate) fn metrics(&self) -> Option<&StepMetrics> {
        self.metrics.as_ref()
    }

    /// Loss of the newest evaluation.
    pub(crate) fn eval_loss(&self) -> Option<f64> {
        self.eval_loss
    }

    /// The adapter in the result; `None` before the job has succeeded.
    pub(crate) fn exported(&self) -> Option<v1::ExportedAdapter> {
        self.exported
    }

    /// Mean number of bytes that rank 0 sent in a received step.
    pub(crate) fn reduced_bytes(&self) -> Option<u64> {
        self.reduced_bytes.checked_div(self.steps)
    }

    /// Tokens per second since the first received step of the current group; `None` before the
    /// second.
    pub(crate) fn tokens_per_second(&self) -> Option<f64> {
        let (first, last, seconds) = self.span()?;
        Some(last.tokens.saturating_sub(first.tokens) as f64 / seconds)
    }

    /// Seconds until the last step of the job, at the current speed.
    pub(crate) fn seconds_left(&self) -> Option<f64> {
        let (first, last, seconds) = self.span()?;
        let pace = seconds / last.step.saturating_sub(first.step).max(1) as f64;
        Some(pace * self.facts?.total_steps.saturating_sub(last.step) as f64)
    }

    fn span(&self) -> Option<(StepSample, StepSample, f64)> {
        let (first, last) = self.first.zip(self.last)?;
        let seconds = last.seconds - first.seconds;
        (seconds > 0.0).then_some((first, last, seconds))
    }
}

fn seconds(time: &Timestamp) -> f64 {
    time.seconds as f64 + f64::from(time.nanos) * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Option<Timestamp> {
        Some(Timestamp { seconds, nanos: 0 })
    }

    fn step(step: u64, seconds: i64, eval_loss: Option<f64>) -> WatchItem {
        let metrics =
            StepMetrics { step, loss: 2.0, num_tokens: 100 * step, eval_loss, ..StepMetrics::default() };
        WatchItem::Step(v1::StepReport {
            metrics: Some(metrics),
            reduced_bytes: 1 << 20,
            time: at(seconds),
            ..v1::StepReport::default()
        })
    }

    #[test]
    fn tokens_per_second_covers_first_to_last_step() {
        let facts = v1::RunFacts { total_steps: 9, ..v1::RunFacts::default() };
        let mut stats = JobStats::from_job(&v1::Job { facts: Some(facts), ..v1::Job::default() });
        stats.update(&step(5, 1000, None));
        assert_eq!(stats.tokens_per_second(), None);
        stats.update(&step(6, 1001, Some(0.5)));
        stats.update(&step(7, 1004, None));
        assert_eq!((stats.tokens_per_second(), stats.seconds_left()), (Some(50.0), Some(4.0)));
        assert_eq!((stats.completed_steps(), stats.eval_loss()), (7, Some(0.5)));
        assert_eq!(stats.reduced_bytes(), Some(1 << 20));
    }

    #[test]
    fn time_between_groups_is_not_counted() {
        let kind = job_event::Kind::Assigned(v1::Assigned::default());
        let assigned = WatchItem::Event(v1::JobEvent { number: 1, time: at(500), kind: Some(kind) });
        let mut stats = JobStats::default();
        for item in [step(1, 100, None), step(2, 101, None), assigned, step(3, 501, None)] {
            stats.update(&item);
        }
        assert_eq!(stats.tokens_per_second(), None);
        stats.update(&step(4, 502, None));
        assert_eq!(stats.tokens_per_second(), Some(100.0));
    }
}
