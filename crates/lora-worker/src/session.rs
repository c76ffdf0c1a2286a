//! The worker's stream to the coordinator.

use std::time::Duration;

use lora_proto::MAX_MESSAGE_BYTES;
use lora_proto::v1::worker_control_client::WorkerControlClient;
use lora_proto::v1::{self, coordinator_message, job_command, worker_message};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::WorkerError;
use crate::assignment::carry_out;
use crate::engine::{Command, Engine, Task};

const CONNECT: Duration = Duration::from_secs(10);
/// A silent coordinator is asked for a sign of life this often, and given up when none comes.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Messages that may wait to be sent.
const OUTBOX: usize = 16;
/// Commands that may wait for the engine; there are but three kinds.
const COMMANDS: usize = 8;
/// How long the engine may take to finish its step when the worker ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// Connects to the coordinator at `address`.
pub(crate) async fn connect(address: &str) -> Result<Channel, WorkerError> {
    let unreachable = |source| WorkerError::Unreachable { address: address.to_owned(), source };
    Endpoint::from_shared(address.to_owned())
        .map_err(unreachable)?
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect()
        .await
        .map_err(unreachable)
}

/// Says hello and takes assignments until told to end. An engine that does not end in time is left to the end of the process.
pub(crate) async fn serve(
    channel: Channel,
    name: String,
    peer_address: String,
    engine: Engine,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let Engine { tasks, ended } = engine;
    let (outbox, messages) = mpsc::channel(OUTBOX);
    let hello = v1::Hello { name, numerics_id: lora_train::numerics_id(), peer_address };
    let hello = v1::WorkerMessage { kind: Some(worker_message::Kind::Hello(hello)) };
    // There is room for the first message, and the receiver is here.
    let _ = outbox.send(hello).await;
    let mut session = Session { channel, outbox, tasks, current: None, running: JoinSet::new() };
    let result = tokio::select! {
        result = session.listen(ReceiverStream::new(messages)) => result,
        () = stop.cancelled() => Ok(()),
    };
    // Ends the assignment's task, and with its channels the engine's thread.
    drop(session);
    let _ = timeout(FAREWELL, ended).await;
    result
}

struct Session {
    channel: Channel,
    outbox: mpsc::Sender<v1::WorkerMessage>,
    tasks: mpsc::Sender<Task>,
    current: Option<Current>,
    /// The task of the current assignment; aborted when the session ends.
    running: JoinSet<()>,
}

/// The assignment that is being carried out.
struct Current {
    job_id: String,
    generation: u64,
    commands: mpsc::Sender<Command>,
}

impl Session {
    async fn listen(&mut self, messages: ReceiverStream<v1::WorkerMessage>) -> Result<(), WorkerError> {
        let mut client =
            WorkerControlClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let connected = client.connect(messages).await;
        let mut inbox = connected.map_err(|status| WorkerError::Refused(Box::new(status)))?.into_inner();
        loop {
            let message = tokio::select! {
                message = inbox.message() => message,
                Some(ended) = self.running.join_next() => {
                    ended?;
                    continue;
                }
            };
            let message = message.map_err(|status| WorkerError::Lost(status.message().to_owned()))?;
            let message = message.ok_or_else(|| WorkerError::Lost("it closed the stream".into()))?;
            match message.kind {
                Some(coordinator_message::Kind::Assignment(assignment)) => self.take(*assignment).await?,
                Some(coordinator_message::Kind::Command(command)) => self.obey(&command)?,
                Some(coordinator_message::Kind::Shutdown(_)) => return Ok(()),
                None => return Err(WorkerError::Protocol("a message without content".into())),
            }
        }
    }

    async fn take(&mut self, assignment: v1::Assignment) -> Result<(), WorkerError> {
        // The task before has said that it is done, and is about to be.
        while let Some(ended) = timeout(FAREWELL, self.running.join_next())
            .await
            .map_err(|_| WorkerError::Protocol("an assignment while another is carried out".into()))?
        {
            ended?;
        }
        tracing::info!(job = assignment.job_id, rank = assignment.rank, "job assigned");
        let (commands, received) = mpsc::channel(COMMANDS);
        self.current =
            Some(Current { job_id: assignment.job_id.clone(), generation: assignment.generation, commands });
        let (tasks, outbox) = (self.tasks.clone(), self.outbox.clone());
        self.running.spawn(carry_out(assignment, received, tasks, outbox, self.channel.clone()));
        Ok(())
    }

    /// Commands about another assignment than the current one are too late to matter.
    fn obey(&self, command: &v1::JobCommand) -> Result<(), WorkerError> {
        let kind = match command.kind {
            Some(job_command::Kind::Start(_)) => Command::Start,
            Some(job_command::Kind::Pause(_)) => Command::Pause,
            Some(job_command::Kind::Drop(_)) => Command::Drop,
            None => return Err(WorkerError::Protocol("a command without content".into())),
        };
        let current = self.current.as_ref();
        match current.filter(|c| (&c.job_id, c.generation) == (&command.job_id, command.generation)) {
            Some(current) => match current.commands.try_send(kind) {
                // Closed: the assignment has been let go of already.
                Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
                Err(mpsc::error::TrySendError::Full(_)) => {
                    Err(WorkerError::Protocol("more commands than a job can have".into()))
                }
            },
            None => Ok(()),
        }
    }
}
