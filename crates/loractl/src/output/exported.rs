//! The adapter in a result, as text and as data for JSON and YAML.

use lora_proto::v1;
use serde::Serialize;

use super::table::Table;

/// The adapter in a result, with the field names of JSON and YAML.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ExportedView {
    /// The step whose parameters it has.
    step: u64,
    /// Loss of the evaluation after this step.
    eval_loss: Option<f64>,
    /// Whether training ended because the evaluation loss did not improve.
    stopped_early: bool,
}

impl From<v1::ExportedAdapter> for ExportedView {
    fn from(exported: v1::ExportedAdapter) -> Self {
        let v1::ExportedAdapter { step, eval_loss, stopped_early } = exported;
        Self { step, eval_loss, stopped_early }
    }
}

impl ExportedView {
    /// Adds the rows about a job that stopped early, or whose adapter is not that of its last step.
    pub(crate) fn rows(&self, table: &mut Table, last_step: u64) {
        if self.stopped_early {
            table.row("stopped early", "eval loss did not improve for early_stopping_patience evaluations");
        }
        if self.step != last_step {
            table.row("exported step", format!("{}{}", self.step, self.loss_text()));
        }
    }

    /// The text of an event.
    pub(crate) fn text(&self) -> String {
        let early = if self.stopped_early { ", stopped early" } else { "" };
        format!("adapter of step {}{}{early}", self.step, self.loss_text())
    }

    fn loss_text(&self) -> String {
        self.eval_loss.map(|loss| format!(" (eval loss {loss:.4})")).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_and_events_tell_the_exported_step_and_why_training_ended() {
        let view = |step, eval_loss, stopped_early| {
            ExportedView::from(v1::ExportedAdapter { step, eval_loss, stopped_early })
        };
        let table = |view: &ExportedView| {
            let mut table = Table::new();
            view.rows(&mut table, 8);
            table.to_string()
        };
        let early = view(4, Some(0.25), true);
        assert_eq!(early.text(), "adapter of step 4 (eval loss 0.2500), stopped early");
        let text = table(&early);
        assert!(text.contains("stopped early") && text.contains("4 (eval loss 0.2500)"), "{text}");
        let last = view(8, None, false);
        assert_eq!((last.text().as_str(), table(&last).as_str()), ("adapter of step 8", ""));
    }
}
