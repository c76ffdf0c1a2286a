//! The stream between this worker and the coordinator, opened again whenever it ends.

use std::io;
use std::time::Duration;

use backon::BackoffBuilder;
use lora_proto::MAX_MESSAGE_BYTES;
use lora_proto::v1::coordinator_message::Kind as FromCoordinator;
use lora_proto::v1::worker_control_client::WorkerControlClient;
use lora_proto::v1::worker_message::Kind as FromWorker;
use lora_proto::v1::{self, WorkerStatus};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::address::PeerAddress;
use crate::backoff::backoff;
use crate::directive::DesiredState;
use crate::memory::MemoryLimit;
use crate::status::{self, CurrentJob};
use crate::step_outbox::StepOutbox;

/// How long the coordinator may take to answer a hello.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the coordinator may take to hear the last words.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Messages that may wait to be sent.
const OUTBOX_CAPACITY: usize = 16;
/// Steps that are finished within this time are told together.
const STEP_BATCH_INTERVAL: Duration = Duration::from_millis(50);
/// Limits of what a coordinator may ask for as time between heartbeats.
const HEARTBEAT_LIMITS: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(60)];

/// The worker's side of its stream.
pub(crate) struct Session {
    pub(crate) channel: Channel,
    pub(crate) name: String,
    /// Tells this process from another one of the same name.
    pub(crate) instance_id: String,
    /// What the bits of a result depend on here: workers that share a job have the same.
    pub(crate) numerics_id: String,
    pub(crate) address: PeerAddress,
    pub(crate) memory: MemoryLimit,
    pub(crate) steps: StepOutbox,
    pub(crate) desired: watch::Sender<DesiredState>,
    pub(crate) status: watch::Receiver<Option<CurrentJob>>,
    pub(crate) draining: watch::Receiver<bool>,
    /// Whether a coordinator is there.
    pub(crate) connected: watch::Sender<bool>,
    /// The highest term seen: an older coordinator is one that has been replaced.
    pub(crate) term: u64,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum DisconnectReason {
    #[error("no address for peers: {0}")]
    Address(#[source] io::Error),
    #[error("{}", .0.message())]
    Refused(Box<Status>),
    #[error("another process of this name is connected: {}", .0.message())]
    NameTaken(Box<Status>),
    #[error("it has term {term}, and one with term {seen} was seen: it has been replaced")]
    Outdated { term: u64, seen: u64 },
    #[error("it did not answer within {0:?}")]
    Silent(Duration),
    #[error("it closed the stream")]
    Closed,
    #[error("it broke the protocol: {0}")]
    Protocol(&'static str),
}

impl From<Status> for DisconnectReason {
    fn from(status: Status) -> Self {
        match status.code() {
            Code::AlreadyExists => Self::NameTaken(Box::new(status)),
            _ => Self::Refused(Box::new(status)),
        }
    }
}

impl Session {
    /// Connects again and again, until `ending` is cancelled; then tells the last status, if there is somebody to tell.
    pub(crate) async fn run(mut self, ending: CancellationToken) {
        let mut pauses = backoff().build();
        loop {
            let ended = self.run_stream(&ending).await;
            let was_connected = self.connected.send_replace(false);
            if ending.is_cancelled() {
                return;
            }
            if was_connected {
                pauses = backoff().build();
            }
            let pause = pauses.next().unwrap_or_default();
            if let Err(reason) = ended {
                tracing::warn!(%reason, retry_in = ?pause, "no coordinator");
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = ending.cancelled() => return,
            }
        }
    }

    /// One stream, to its end.
    async fn run_stream(&mut self, ending: &CancellationToken) -> Result<(), DisconnectReason> {
        let (outbox, messages) = mpsc::channel(OUTBOX_CAPACITY);
        // Directives are counted anew; what the last one said stays wanted.
        self.desired.send_modify(|desired| desired.number = 0);
        let opened = async {
            let hello = self.hello().await.map_err(DisconnectReason::Address)?;
            // There is room for the first message, and the receiver is here.
            let _ = outbox.send(hello).await;
            let client = WorkerControlClient::new(self.channel.clone());
            let mut client = client.max_decoding_message_size(MAX_MESSAGE_BYTES);
            let mut inbox = client.connect(ReceiverStream::new(messages)).await?.into_inner();
            match inbox.message().await?.and_then(|message| message.kind) {
                Some(FromCoordinator::Welcome(welcome)) => Ok((inbox, welcome)),
                Some(_) => Err(DisconnectReason::Protocol("its first message is no welcome")),
                None => Err(DisconnectReason::Closed),
            }
        };
        let (inbox, welcome) = tokio::select! {
            opened = timeout(WELCOME_TIMEOUT, opened) => opened.map_err(|_| DisconnectReason::Silent(WELCOME_TIMEOUT))??,
            () = ending.cancelled() => return Ok(()),
        };
        if welcome.term < self.term {
            return Err(DisconnectReason::Outdated { term: welcome.term, seen: self.term });
        }
        self.term = welcome.term;
        let heartbeat = Duration::try_from_secs_f64(welcome.heartbeat_seconds)
            .map_err(|_| DisconnectReason::Protocol("its time between heartbeats is none"))?;
        tracing::info!(term = welcome.term, "coordinator connected");
        self.steps.rewind();
        self.connected.send_replace(true);
        let updates =
            self.send_updates(outbox, heartbeat.clamp(HEARTBEAT_LIMITS[0], HEARTBEAT_LIMITS[1]), ending);
        let listening = self.listen(inbox);
        tokio::pin!(listening);
        tokio::select! {
            ended = &mut listening => ended,
            () = updates => {
                // The last words are on their way; the coordinator closes its side once it has them.
                let _ = timeout(SHUTDOWN_TIMEOUT, listening).await;
                Err(DisconnectReason::Closed)
            }
        }
    }

    async fn hello(&self) -> io::Result<v1::WorkerMessage> {
        let hello = v1::Hello {
            name: self.name.clone(),
            instance_id: self.instance_id.clone(),
            numerics_id: self.numerics_id.clone(),
            peer_address: self.address.resolve().await?,
            version: env!("CARGO_PKG_VERSION").into(),
            status: Some(self.status()),
            memory: self.memory.bytes.unwrap_or(0),
            gpu: self.memory.gpu,
        };
        Ok(v1::WorkerMessage { kind: Some(FromWorker::Hello(hello)) })
    }

    fn status(&self) -> WorkerStatus {
        status::status_message(self.status.borrow().as_ref(), &self.desired.borrow(), *self.draining.borrow())
    }

    /// Takes what the coordinator says, until it says no more.
    async fn listen(&self, mut inbox: Streaming<v1::CoordinatorMessage>) -> Result<(), DisconnectReason> {
        while let Some(message) = inbox.message().await? {
            match message.kind {
                Some(FromCoordinator::Directive(directive)) => {
                    let goal = directive.goal();
                    let assignment = directive.assignment.as_ref();
                    let (job, generation) = (assignment.map(|a| &a.job_id), assignment.map(|a| a.generation));
                    tracing::debug!(job, generation, goal = goal.as_str_name(), "directive");
                    self.desired.send_replace((*directive).into());
                }
                Some(FromCoordinator::StepsAck(ack)) => self.steps.acknowledge(&ack.job_id, ack.step),
                Some(FromCoordinator::Welcome(_)) => {
                    return Err(DisconnectReason::Protocol("a second welcome"));
                }
                // Of a newer revision; what it asks for is not known here.
                None => {}
            }
        }
        Err(DisconnectReason::Closed)
    }

    /// Tells steps, and the status at every heartbeat and every change, until `ending`.
    async fn send_updates(
        &self,
        outbox: mpsc::Sender<v1::WorkerMessage>,
        heartbeat: Duration,
        ending: &CancellationToken,
    ) {
        let (mut status, mut draining) = (self.status.clone(), self.draining.clone());
        let mut desired = self.desired.subscribe();
        let mut heartbeats = interval(heartbeat);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut steps_due = Instant::now();
        let mut last_sent = None;
        loop {
            let is_due = tokio::select! {
                _ = heartbeats.tick() => true,
                () = ending.cancelled() => true,
                () = sleep_until(steps_due), if self.steps.has_unsent() => false,
                Ok(()) = status.changed() => false,
                Ok(()) = desired.changed() => false,
                Ok(()) = draining.changed() => false,
            };
            let is_ending = ending.is_cancelled();
            let message = self.status();
            let urgent_part = status::urgent_part(message.clone());
            let is_news = is_due || last_sent.as_ref() != Some(&urgent_part);
            if is_news || Instant::now() >= steps_due {
                // Steps first, so that whoever hears that the job is finished has all of them.
                while let Some(steps) = self.steps.next() {
                    steps_due = Instant::now() + STEP_BATCH_INTERVAL;
                    if send(&outbox, FromWorker::Steps(steps)).await.is_none() {
                        return;
                    }
                }
            }
            if is_news {
                last_sent = Some(urgent_part);
                if send(&outbox, FromWorker::Status(message)).await.is_none() {
                    return;
                }
            }
            if is_ending {
                return;
            }
        }
    }
}

/// None: the stream has ended, and its other side says why.
async fn send(outbox: &mpsc::Sender<v1::WorkerMessage>, kind: FromWorker) -> Option<()> {
    outbox.send(v1::WorkerMessage { kind: Some(kind) }).await.ok()
}
