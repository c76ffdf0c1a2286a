//! The gRPC service `WorkerControl`: the stream that a worker opens, and the task that reads it.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use lora_proto::v1::{self, coordinator_message, worker_message};
use lora_spec::FieldError;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::Commands;
use crate::control::workers::{OUTBOX_CAPACITY, SessionId};
use crate::refusal::Refusal;
use crate::service::command::Command;

/// The time within which a worker must send its hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct WorkerControl {
    commands: Commands,
    welcome: v1::Welcome,
    /// The time without a message after which a worker's stream is closed.
    lease: Duration,
    /// The tasks that read the streams; each ends with its stream or with the service.
    sessions: TaskTracker,
}

impl WorkerControl {
    pub(crate) fn new(
        commands: Commands,
        welcome: v1::Welcome,
        lease: Duration,
        sessions: TaskTracker,
    ) -> Self {
        Self { commands, welcome, lease, sessions }
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
        let first = timeout(HELLO_TIMEOUT, messages.message())
            .await
            .map_err(|_| Status::deadline_exceeded(format!("no hello came within {HELLO_TIMEOUT:?}")))??;
        let Some(worker_message::Kind::Hello(hello)) = first.and_then(|message| message.kind) else {
            let error = FieldError::new("hello", "is missing; a worker's first message is its hello".into());
            return Err(Refusal::from(error).into());
        };
        let (outbox, messages_out) = mpsc::channel(OUTBOX_CAPACITY);
        let welcome = coordinator_message::Kind::Welcome(self.welcome);
        // The queue is empty, so this cannot fail.
        let _ = outbox.try_send(Ok(v1::CoordinatorMessage { kind: Some(welcome) }));
        let hello = Box::new(hello);
        let session = self.commands.ask(|reply| Command::Hello { hello, outbox, reply }).await?;
        let (commands, lease) = (self.commands.clone(), self.lease);
        self.sessions.spawn(async move {
            let cause = tokio::select! {
                cause = listen(&mut messages, session, lease, &commands) => cause,
                // The service has ended and cannot take the command below.
                () = commands.closed() => return,
            };
            let _ = commands.send(Command::WorkerGone { session, cause }).await;
        });
        Ok(Response::new(ReceiverStream::new(messages_out).boxed()))
    }
}

/// Forwards a worker's messages to the service until the stream ends. Returns the reason of the
/// end.
async fn listen(
    messages: &mut Streaming<v1::WorkerMessage>,
    session: SessionId,
    lease: Duration,
    commands: &Commands,
) -> String {
    loop {
        let command = match timeout(lease, messages.message()).await {
            Err(_) => return format!("no message came for {lease:?}"),
            Ok(Ok(None)) => return "the worker closed the stream".to_owned(),
            Ok(Err(status)) => return format!("the connection failed: {}", status.message()),
            Ok(Ok(Some(message))) => match message.kind {
                Some(worker_message::Kind::Status(status)) => {
                    Command::Status { session, status: Box::new(status) }
                }
                Some(worker_message::Kind::Steps(steps)) => Command::Steps { session, steps },
                Some(worker_message::Kind::Hello(_)) | None => {
                    return "the worker sent an invalid message".to_owned();
                }
            },
        };
        if commands.send(command).await.is_err() {
            return "the coordinator is shutting down".to_owned();
        }
    }
}
