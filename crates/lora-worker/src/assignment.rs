//! One assignment as the session sees it: between the coordinator's stream and the engine's thread.

use lora_proto::v1::{self, job_report, worker_message};
use lora_spec::JobSpec;
use tokio::sync::mpsc;
use tonic::transport::Channel;

use crate::engine::{Command, Event, Task};
use crate::transfer::{download_checkpoint, upload};

/// Events of the engine that may wait to be passed on; checkpoints among them, so few.
const EVENTS: usize = 4;

/// Carries an assignment out. It ends with the report that the job's memory is free; an error before or between the
/// engine's own reports is reported as this worker's. Ends early only when the session does.
pub(crate) async fn carry_out(
    assignment: v1::Assignment,
    commands: mpsc::Receiver<Command>,
    tasks: mpsc::Sender<Task>,
    outbox: mpsc::Sender<v1::WorkerMessage>,
    channel: Channel,
) {
    let reports = Reports { job_id: assignment.job_id.clone(), generation: assignment.generation, outbox };
    match prepare(assignment.clone(), channel.clone()).await {
        Ok((job, checkpoint)) => {
            let (events, received) = mpsc::channel(EVENTS);
            let task = Task { assignment: assignment.clone(), job, checkpoint, commands, events };
            if tasks.send(task).await.is_ok() {
                pass_on(received, &reports, &assignment, channel).await;
            } else {
                reports.failed("the engine's thread has ended".into()).await;
            }
        }
        Err(cause) => {
            reports.failed(cause).await;
            wait_for_drop(commands).await;
        }
    }
    reports.send(job_report::Kind::Released(v1::Released {})).await;
}

/// What the engine needs beside the assignment itself.
async fn prepare(assignment: v1::Assignment, channel: Channel) -> Result<(JobSpec, Option<Vec<u8>>), String> {
    let job = JobSpec::try_from(assignment.job.unwrap_or_default()).map_err(|error| error.to_string())?;
    let checkpoint = match assignment.checkpoint_step.filter(|_| assignment.rank == 0) {
        Some(step) => {
            let downloaded = download_checkpoint(channel, &assignment.job_id, step).await;
            Some(downloaded.map_err(|error| error.to_string())?)
        }
        None => None,
    };
    Ok((job, checkpoint))
}

/// Sends what the engine says, in its order, until it has let go of the job. After a failed upload the rest is dropped.
async fn pass_on(
    mut events: mpsc::Receiver<Event>,
    reports: &Reports,
    assignment: &v1::Assignment,
    channel: Channel,
) {
    let mut failed = false;
    while let Some(event) = events.recv().await {
        match event {
            _ if failed => {}
            Event::Report(kind) => reports.send(kind).await,
            Event::Upload { name, bytes } => {
                if let Err(error) = upload(channel.clone(), assignment, name, bytes).await {
                    reports.failed(error.to_string()).await;
                    failed = true;
                }
            }
        }
    }
}

/// The session ends this wait if it ends itself.
async fn wait_for_drop(mut commands: mpsc::Receiver<Command>) {
    while !matches!(commands.recv().await, None | Some(Command::Drop)) {}
}

/// Reports about one assignment.
struct Reports {
    job_id: String,
    generation: u64,
    outbox: mpsc::Sender<v1::WorkerMessage>,
}

impl Reports {
    async fn failed(&self, cause: String) {
        let failed = v1::WorkerFailed { cause, ..v1::WorkerFailed::default() };
        self.send(job_report::Kind::Failed(failed)).await;
    }

    /// A session that is gone has no one to tell.
    async fn send(&self, kind: job_report::Kind) {
        let report =
            v1::JobReport { job_id: self.job_id.clone(), generation: self.generation, kind: Some(kind) };
        let kind = Some(worker_message::Kind::Report(report));
        let _ = self.outbox.send(v1::WorkerMessage { kind }).await;
    }
}
