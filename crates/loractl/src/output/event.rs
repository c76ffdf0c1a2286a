//! Events and steps of a job, as text and as data for JSON and YAML.

use lora_proto::v1::{self, StepMetrics, job_event};
use serde::Serialize;

use super::bytes;
use super::exported::ExportedView;
use super::job::{FactsView, FailureView, FileView, JobView, failure_text};
use super::units::{count, format_time};

/// An item in the output of a watched job.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum Item {
    Event(EventView),
    Step(StepView),
    /// The job when watching ends, or when it begins.
    Job(Box<JobView>),
}

/// An event of a job.
#[derive(Debug, Serialize)]
pub(crate) struct EventView {
    number: u64,
    time: String,
    #[serde(flatten)]
    kind: KindView,
}

#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum KindView {
    StateChanged {
        state: String,
        failure: Option<FailureView>,
    },
    Assigned {
        generation: u64,
        workers: Vec<String>,
        checkpoint_step: Option<u64>,
        reason: String,
    },
    BaseReady {
        worker: String,
        sha256: String,
        cached: bool,
        seconds: f64,
    },
    Prepared {
        completed_steps: u64,
        facts: FactsView,
    },
    WorkerLost {
        worker: String,
        rank: u32,
        cause: String,
    },
    CheckpointSaved {
        step: u64,
        bytes: u64,
    },
    Notice {
        worker: String,
        step: u64,
        text: String,
    },
    ResultSaved {
        files: Vec<FileView>,
        exported: Option<ExportedView>,
    },
    /// An event of a kind that only a newer coordinator has.
    Unknown,
}

/// A finished step.
#[derive(Debug, Serialize)]
pub(crate) struct StepView {
    time: String,
    #[serde(flatten)]
    metrics: StepMetrics,
    reduced_bytes: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    notice: String,
}

impl From<v1::JobEvent> for EventView {
    fn from(event: v1::JobEvent) -> Self {
        let v1::JobEvent { number, time, kind } = event;
        Self {
            number,
            time: format_time(time.as_ref()),
            kind: kind.map_or(KindView::Unknown, KindView::from),
        }
    }
}

impl From<job_event::Kind> for KindView {
    fn from(kind: job_event::Kind) -> Self {
        use job_event::Kind;
        match kind {
            Kind::StateChanged(v1::StateChanged { state, failure }) => {
                Self::StateChanged { state, failure: failure.map(Into::into) }
            }
            Kind::Assigned(v1::Assigned { generation, workers, checkpoint_step, reason }) => {
                Self::Assigned { generation, workers, checkpoint_step, reason }
            }
            Kind::BaseReady(v1::BaseReady { worker, sha256, cached, seconds }) => {
                Self::BaseReady { worker, sha256, cached, seconds }
            }
            Kind::Prepared(v1::RunPrepared { facts, completed_steps }) => {
                Self::Prepared { completed_steps, facts: facts.unwrap_or_default().into() }
            }
            Kind::WorkerLost(v1::WorkerLost { worker, rank, cause }) => {
                Self::WorkerLost { worker, rank, cause }
            }
            Kind::CheckpointSaved(v1::CheckpointSaved { step, digest }) => {
                Self::CheckpointSaved { step, bytes: digest.map_or(0, |digest| digest.size) }
            }
            Kind::Notice(v1::Notice { worker, step, text }) => Self::Notice { worker, step, text },
            Kind::ResultSaved(v1::ResultSaved { files, exported }) => Self::ResultSaved {
                files: files.into_iter().map(Into::into).collect(),
                exported: exported.map(Into::into),
            },
        }
    }
}

impl From<v1::StepReport> for StepView {
    fn from(step: v1::StepReport) -> Self {
        let v1::StepReport { metrics, logged: _, reduced_bytes, time, notice } = step;
        Self { time: format_time(time.as_ref()), metrics: metrics.unwrap_or_default(), reduced_bytes, notice }
    }
}

/// Formats an event as one line, or as several if its cause has several.
pub(crate) fn event_text(event: &v1::JobEvent) -> String {
    use job_event::Kind;
    match &event.kind {
        Some(Kind::StateChanged(v1::StateChanged { state, failure: None })) => state.clone(),
        Some(Kind::StateChanged(v1::StateChanged { state, failure: Some(failure) })) => {
            format!("{state}: {}", failure_text(failure))
        }
        Some(Kind::Assigned(v1::Assigned { generation, workers, checkpoint_step, reason })) => {
            let mut text = match workers.as_slice() {
                [worker] => format!("assigned to {worker}"),
                workers => format!("assigned to {} workers ({})", workers.len(), workers.join(", ")),
            };
            if let Some(step) = checkpoint_step {
                text += &format!(", from the checkpoint of step {step}");
            }
            if !reason.is_empty() {
                text += &format!(", because {reason}");
            }
            format!("{text}; generation {generation}")
        }
        Some(Kind::BaseReady(v1::BaseReady { worker, cached: true, .. })) => {
            format!("{worker}: base already in memory")
        }
        Some(Kind::BaseReady(v1::BaseReady { worker, seconds, .. })) => {
            format!("{worker}: base loaded in {seconds:.1} s")
        }
        Some(Kind::Prepared(v1::RunPrepared { facts, completed_steps })) => {
            let facts = facts.unwrap_or_default();
            let from = if *completed_steps > 0 {
                format!(", from step {completed_steps} on")
            } else {
                String::new()
            };
            format!(
                "training {} of {} parameters for {} steps ({} an epoch){from}",
                count(facts.trainable_parameters),
                count(facts.total_parameters),
                count(facts.total_steps),
                count(facts.steps_per_epoch)
            )
        }
        Some(Kind::WorkerLost(v1::WorkerLost { worker, rank, cause })) => {
            format!("lost {worker} (rank {rank}): {cause}")
        }
        Some(Kind::CheckpointSaved(v1::CheckpointSaved { step, digest })) => {
            let size = digest.as_ref().map_or(0, |digest| digest.size);
            format!("checkpoint of step {step} saved ({})", bytes(size))
        }
        Some(Kind::Notice(v1::Notice { worker, step, text })) => {
            let worker = if worker.is_empty() { "coordinator" } else { worker };
            format!("{worker}, step {step}: {text}")
        }
        Some(Kind::ResultSaved(v1::ResultSaved { files, exported })) => {
            let size = files.iter().filter_map(|file| file.digest.as_ref()).map(|digest| digest.size).sum();
            let adapter = exported.map(|exported| format!("; {}", ExportedView::from(exported).text()));
            format!(
                "result saved by the coordinator: {} files ({}){}",
                files.len(),
                bytes(size),
                adapter.unwrap_or_default()
            )
        }
        None => "an event of a kind that this version of loractl does not support".into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn event(kind: job_event::Kind) -> v1::JobEvent {
        let time = prost_types::Timestamp { seconds: 1_614_729_600, nanos: 7 };
        v1::JobEvent { number: 3, time: Some(time), kind: Some(kind) }
    }

    #[test]
    fn an_event_is_flat_in_json() {
        let kind = job_event::Kind::StateChanged(v1::StateChanged { state: "queued".into(), failure: None });
        let line = serde_json::to_value(Item::Event(event(kind).into())).unwrap();
        let expected = json!({
            "type": "event", "number": 3, "time": "2021-03-03T00:00:00Z", "event": "state_changed",
            "state": "queued", "failure": null,
        });
        assert_eq!(line, expected);
    }

    #[test]
    fn a_step_has_the_keys_of_metrics_jsonl() {
        let metrics = StepMetrics { step: 4, loss: 0.5, num_tokens: 9, ..StepMetrics::default() };
        let step = v1::StepReport { metrics: Some(metrics), ..v1::StepReport::default() };
        let line: Value = serde_json::to_value(Item::Step(step.into())).unwrap();
        assert_eq!((&line["type"], &line["step"], &line["loss"]), (&json!("step"), &json!(4), &json!(0.5)));
        assert!(line.get("notice").is_none(), "{line}");
    }

    #[test]
    fn every_event_can_be_written_as_yaml() {
        let kind = job_event::Kind::CheckpointSaved(v1::CheckpointSaved { step: 4, digest: None });
        let text = serde_saphyr::to_string(&Item::Event(event(kind).into())).unwrap();
        assert!(text.contains("event: checkpoint_saved") && text.contains("step: 4"), "{text}");
    }

    #[test]
    fn event_texts_have_the_relevant_fields() {
        let assigned = v1::Assigned {
            generation: 2,
            workers: vec!["w0".into(), "w2".into()],
            checkpoint_step: Some(8),
            reason: "worker w1 was lost".into(),
        };
        let text = event_text(&event(job_event::Kind::Assigned(assigned)));
        assert_eq!(
            text,
            "assigned to 2 workers (w0, w2), from the checkpoint of step 8, because worker w1 was lost; \
             generation 2"
        );
        let failure = v1::Failure {
            worker: Some("w0".into()),
            rank: Some(0),
            completed_steps: 5,
            cause: "loss is not finite".into(),
        };
        let failed = v1::StateChanged { state: "failed".into(), failure: Some(failure) };
        let text = event_text(&event(job_event::Kind::StateChanged(failed)));
        assert_eq!(text, "failed: w0 (rank 0), after step 5: loss is not finite");
        assert!(event_text(&v1::JobEvent::default()).contains("does not support"));
    }
}
