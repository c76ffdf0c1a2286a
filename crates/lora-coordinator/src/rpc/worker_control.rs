//! `WorkerControl`: the stream a worker opens, and the task that listens to it.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use lora_proto::v1::{self, worker_message};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::Commands;
use crate::command::{Command, OUTBOX_MESSAGES, SessionId};

/// How long a worker may take to say hello.
const HELLO: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct WorkerControl {
    commands: Commands,
    sessions: TaskTracker,
}

impl WorkerControl {
    pub(crate) fn new(commands: Commands, sessions: TaskTracker) -> Self {
        Self { commands, sessions }
    }
}

#[tonic::async_trait]
impl v1::worker_control_server::WorkerControl for WorkerControl {
    type ConnectStream = BoxStream<'static, Result<v1::CoordinatorMessage, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let mut messages = request.into_inner();
        let first = timeout(HELLO, messages.message())
            .await
            .map_err(|_| Status::deadline_exceeded(format!("no hello came within {HELLO:?}")))??;
        let Some(worker_message::Kind::Hello(hello)) = first.and_then(|message| message.kind) else {
            return Err(Status::invalid_argument("a worker's first message is its hello"));
        };
        let (outbox, messages_out) = mpsc::channel(OUTBOX_MESSAGES);
        let session = self.commands.ask(|reply| Command::Hello { hello, outbox, reply }).await?;
        let commands = self.commands.clone();
        self.sessions.spawn(async move {
            let cause = tokio::select! {
                cause = listen(&mut messages, session, &commands) => cause,
                // The service has ended, and has no workers to lose.
                () = commands.closed() => return,
            };
            let _ = commands.send(Command::WorkerGone { session, cause }).await;
        });
        Ok(Response::new(ReceiverStream::new(messages_out).boxed()))
    }
}

/// Passes a worker's reports on until its stream ends; returns why it did.
async fn listen(
    messages: &mut Streaming<v1::WorkerMessage>,
    session: SessionId,
    commands: &Commands,
) -> String {
    loop {
        let report = match messages.message().await {
            Ok(Some(v1::WorkerMessage { kind: Some(worker_message::Kind::Report(report)) })) => report,
            Ok(Some(_)) => return "it sent something else than a report".to_owned(),
            Ok(None) => return "its stream ended, or was silent for too long".to_owned(),
            Err(status) => return format!("its connection broke: {}", status.message()),
        };
        if commands.send(Command::Report { session, report }).await.is_err() {
            return "the coordinator is shutting down".to_owned();
        }
    }
}
