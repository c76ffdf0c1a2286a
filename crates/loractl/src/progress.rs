//! Progress of a running job on stderr.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lora_proto::v1::{self, StepMetrics, job_event};

use crate::job_watch::WatchItem;
use crate::output::{duration, event_text, format_time};
use crate::stats::JobStats;

/// Without a terminal, step lines have at least this interval. The first step, the last step and
/// evaluations are always shown.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// A progress bar if stderr is a terminal, otherwise lines.
pub(crate) struct ProgressDisplay {
    bar: ProgressBar,
    times: EventTimes,
    last_line: Option<Instant>,
}

/// Whether events are shown with their time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventTimes {
    /// The events may have happened earlier.
    Shown,
    /// The events happen now.
    Hidden,
}

impl ProgressDisplay {
    pub(crate) fn new(times: EventTimes) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        Self { bar, times, last_line: None }
    }

    /// The bar, which must be suspended while other text is written to stderr.
    pub(crate) fn bar(&self) -> &ProgressBar {
        &self.bar
    }

    /// Writes a line above the bar.
    pub(crate) fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// Shows an item that was added to `stats`.
    pub(crate) fn show(&mut self, item: &WatchItem, stats: &JobStats) {
        match item {
            WatchItem::Event(event) => self.show_event(event, stats),
            WatchItem::Step(v1::StepReport { metrics: Some(metrics), notice, .. }) => {
                if !notice.is_empty() {
                    self.say(notice);
                }
                self.show_step(metrics, stats);
            }
            WatchItem::Step(_) => {}
            WatchItem::Note(note) => self.say(note),
        }
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn show_event(&mut self, event: &v1::JobEvent, stats: &JobStats) {
        let text = event_text(event);
        self.say(&match self.times {
            EventTimes::Shown => format!("{}  {text}", format_time(event.time.as_ref())),
            EventTimes::Hidden => text,
        });
        if matches!(event.kind, Some(job_event::Kind::Prepared(_))) || self.bar.length().is_some() {
            self.draw(stats);
        }
    }

    fn show_step(&mut self, metrics: &StepMetrics, stats: &JobStats) {
        if !self.bar.is_hidden() {
            self.draw(stats);
            return;
        }
        let total = stats.facts().unwrap_or_default().total_steps;
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL);
        if due || metrics.eval_loss.is_some() || metrics.step == total {
            self.last_line = Some(Instant::now());
            eprintln!("step {}/{total}  {}", metrics.step, progress_text(stats));
        }
    }

    fn draw(&self, stats: &JobStats) {
        if self.bar.length().is_none() {
            let template = "{prefix} {bar:20} {pos}/{len}  {wide_msg}";
            let style = ProgressStyle::with_template(template);
            self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        }
        self.bar.set_length(stats.facts().unwrap_or_default().total_steps);
        self.bar.set_prefix(stats.state().map_or("", |state| state.name()));
        self.bar.set_position(stats.completed_steps());
        self.bar.set_message(progress_text(stats));
    }
}

/// Formats losses, speed and the time left, as far as they are known.
fn progress_text(stats: &JobStats) -> String {
    let mut parts = Vec::new();
    parts.extend(stats.metrics().map(|metrics| format!("loss {:.4}", metrics.loss)));
    parts.extend(stats.eval_loss().map(|loss| format!("eval loss {loss:.4}")));
    parts.extend(stats.tokens_per_second().map(|rate| format!("{rate:.0} tokens/s")));
    parts.extend(stats.seconds_left().map(|seconds| format!("{} left", duration(seconds))));
    parts.join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_values_are_omitted() {
        assert_eq!(progress_text(&JobStats::default()), "");
        let metrics = StepMetrics { step: 4, loss: 0.5, eval_loss: Some(0.75), ..StepMetrics::default() };
        let job = v1::Job { metrics: Some(metrics), ..v1::Job::default() };
        assert_eq!(progress_text(&JobStats::from_job(&job)), "loss 0.5000  eval loss 0.7500");
    }
}
