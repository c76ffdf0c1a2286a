//! What people see of a running job, on stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lora_proto::v1::{self, job_event};

use super::summary::Tally;

/// Without a terminal, a line comes at most this often (the first and the last step, and evaluations, always).
const LINES: Duration = Duration::from_secs(10);

/// A progress bar where stderr is a terminal; lines where it is not.
pub(crate) struct Progress {
    bar: ProgressBar,
    last_line: Option<Instant>,
}

impl Progress {
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        Self { bar, last_line: None }
    }

    /// The bar, for whoever writes to stderr beside it.
    pub(crate) fn bar(&self) -> &ProgressBar {
        &self.bar
    }

    /// Writes a line.
    pub(crate) fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// Shows an event that `tally` has taken.
    pub(crate) fn show(&mut self, event: &v1::JobEvent, tally: &Tally) {
        match &event.kind {
            Some(job_event::Kind::StateChanged(change))
                if ["preparing", "pausing"].contains(&change.state.as_str()) =>
            {
                self.say(&change.state);
            }
            Some(job_event::Kind::Assigned(assigned)) => {
                if let Some(step) = assigned.checkpoint_step {
                    self.say(&format!("resuming from the checkpoint of step {step}"));
                }
            }
            Some(job_event::Kind::BaseReady(base)) => self.say(&if base.cached {
                format!("{}: base already in memory", base.worker)
            } else {
                format!("{}: base loaded in {:.1} s", base.worker, base.seconds)
            }),
            Some(job_event::Kind::Prepared(prepared)) => {
                let facts = prepared.facts.unwrap_or_default();
                self.say(&format!(
                    "training {} of {} parameters for {} steps ({} an epoch)",
                    facts.trainable_parameters,
                    facts.total_parameters,
                    facts.total_steps,
                    facts.steps_per_epoch
                ));
                self.start_bar(facts.total_steps, prepared.completed_steps);
            }
            Some(job_event::Kind::StepFinished(step)) => {
                if let Some(metrics) = step.metrics {
                    self.show_step(&metrics, tally);
                }
            }
            Some(job_event::Kind::Notice(notice)) => {
                self.say(&format!("{} (rank {}): {}", notice.worker, notice.rank, notice.text));
            }
            _ => {}
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn start_bar(&self, total_steps: u64, completed_steps: u64) {
        let template = "{bar:30} {pos}/{len}  {msg}  {eta} left";
        self.bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        self.bar.set_length(total_steps);
        self.bar.set_position(completed_steps);
        self.bar.reset_eta();
    }

    fn show_step(&mut self, metrics: &v1::StepMetrics, tally: &Tally) {
        let mut text = format!("loss {:.4}", metrics.loss);
        if let Some(eval_loss) = tally.eval_loss() {
            text += &format!("  eval loss {eval_loss:.4}");
        }
        if let Some(rate) = tally.tokens_per_second() {
            text += &format!("  {rate:.0} tokens/s");
        }
        if std::io::stderr().is_terminal() {
            self.bar.set_message(text);
            self.bar.set_position(metrics.step);
            return;
        }
        let total = tally.total_steps();
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINES);
        if due || metrics.eval_loss.is_some() || metrics.step == total {
            self.last_line = Some(Instant::now());
            let left = tally.seconds_left().map(|s| format!("  {s:.0} s left")).unwrap_or_default();
            eprintln!("step {}/{total}  {text}{left}", metrics.step);
        }
    }
}
