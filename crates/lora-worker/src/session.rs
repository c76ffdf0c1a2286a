//! The stream between this worker and the coordinator, which is reopened whenever it ends.

use std::io;
use std::time::Duration;

use backon::BackoffBuilder;
use lora_proto::MAX_MESSAGE_BYTES;
use lora_proto::v1::coordinator_message::Kind as FromCoordinator;
use lora_proto::v1::worker_control_client::WorkerControlClient;
use lora_proto::v1::worker_message::Kind as FromWorker;
use lora_proto::v1::{self, WorkerStatus};
use lora_spec::DeviceMemory;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::address::PeerAddress;
use crate::backoff::backoff;
use crate::directive::{DesiredState, GroupLimits};
use crate::status::{self, CurrentJob};
use crate::step_outbox::StepOutbox;

/// How long the coordinator may take to answer a hello.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the coordinator may take to receive the last status.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// The largest number of messages that wait to be sent.
const OUTBOX_CAPACITY: usize = 16;
/// Steps that finish within this time are sent together.
const STEP_BATCH_INTERVAL: Duration = Duration::from_millis(50);
/// The limits of the interval between heartbeats that a coordinator may request.
const HEARTBEAT_LIMITS: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(60)];

/// The worker's side of its stream.
pub(crate) struct Session {
    pub(crate) channel: Channel,
    pub(crate) name: String,
    /// Distinguishes this process from another one with the same name.
    pub(crate) instance_id: String,
    /// What the bits of a result depend on besides the job. All workers of a job have the same
    /// value.
    pub(crate) numerics_id: String,
    pub(crate) address: PeerAddress,
    pub(crate) memory: DeviceMemory,
    pub(crate) steps: StepOutbox,
    pub(crate) desired: watch::Sender<DesiredState>,
    pub(crate) limits: watch::Sender<Option<GroupLimits>>,
    pub(crate) status: watch::Receiver<Option<CurrentJob>>,
    pub(crate) draining: watch::Receiver<bool>,
    /// Whether a coordinator is connected.
    pub(crate) connected: watch::Sender<bool>,
    /// The highest term seen. A coordinator with an older term has been replaced.
    pub(crate) term: u64,
}

/// The reason why a stream ended.
#[derive(Debug, thiserror::Error)]
enum DisconnectReason {
    #[error("no address for peers: {0}")]
    Address(#[source] io::Error),
    #[error("{}", .0.message())]
    Refused(Box<Status>),
    #[error("another process with this name is connected: {}", .0.message())]
    NameTaken(Box<Status>),
    #[error("the coordinator has term {term}, but one with term {seen} has been seen: it has been replaced")]
    Outdated { term: u64, seen: u64 },
    #[error("the coordinator did not answer within {0:?}")]
    Silent(Duration),
    #[error("the coordinator closed the stream")]
    Closed,
    #[error("the coordinator violated the protocol: {0}")]
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
    /// Connects again and again until `ending` is cancelled. If connected then, sends the last
    /// status.
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
                tracing::warn!(%reason, retry_in = ?pause, "not connected to a coordinator");
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = ending.cancelled() => return,
            }
        }
    }

    /// Runs one stream until it ends.
    async fn run_stream(&mut self, ending: &CancellationToken) -> Result<(), DisconnectReason> {
        let (outbox, messages) = mpsc::channel(OUTBOX_CAPACITY);
        // Directives are numbered per connection. The desired state of the last connection stays.
        self.desired.send_modify(|desired| desired.number = 0);
        let opened = async {
            let hello = self.hello().await.map_err(DisconnectReason::Address)?;
            // This cannot fail or block: the channel is empty and its receiver is alive.
            let _ = outbox.send(hello).await;
            let client = WorkerControlClient::new(self.channel.clone());
            let mut client = client.max_decoding_message_size(MAX_MESSAGE_BYTES);
            let mut inbox = client.connect(ReceiverStream::new(messages)).await?.into_inner();
            match inbox.message().await?.and_then(|message| message.kind) {
                Some(FromCoordinator::Welcome(welcome)) => Ok((inbox, welcome)),
                Some(_) => Err(DisconnectReason::Protocol("its first message is not a welcome")),
                None => Err(DisconnectReason::Closed),
            }
        };
        let (inbox, welcome) = tokio::select! {
            opened = timeout(WELCOME_TIMEOUT, opened) => {
                opened.map_err(|_| DisconnectReason::Silent(WELCOME_TIMEOUT))??
            }
            () = ending.cancelled() => return Ok(()),
        };
        if welcome.term < self.term {
            return Err(DisconnectReason::Outdated { term: welcome.term, seen: self.term });
        }
        self.term = welcome.term;
        let heartbeat = Duration::try_from_secs_f64(welcome.heartbeat_seconds)
            .map_err(|_| DisconnectReason::Protocol("its heartbeat interval is not a duration"))?;
        let limits = GroupLimits::new(&welcome)
            .ok_or(DisconnectReason::Protocol("its time limits for groups are not durations"))?;
        self.limits.send_replace(Some(limits));
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
                // The last status is on its way. The coordinator closes its side once it has
                // received it.
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
            ..v1::Hello::default()
        }
        .with_device_memory(self.memory);
        Ok(v1::WorkerMessage { kind: Some(FromWorker::Hello(hello)) })
    }

    fn status(&self) -> WorkerStatus {
        status::status_message(self.status.borrow().as_ref(), &self.desired.borrow(), *self.draining.borrow())
    }

    /// Processes the coordinator's messages until the stream ends.
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
                // The message is of a newer revision of the protocol, and this worker cannot know
                // its contents.
                None => {}
            }
        }
        Err(DisconnectReason::Closed)
    }

    /// Sends steps, and the status at every heartbeat and every change, until `ending` is
    /// cancelled.
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
                // Steps come first, so that the coordinator has all steps when it receives the
                // status of a finished job.
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

/// Sends a message. Returns `None` if the stream has ended; [`Session::listen`] then returns the
/// reason.
async fn send(outbox: &mpsc::Sender<v1::WorkerMessage>, kind: FromWorker) -> Option<()> {
    outbox.send(v1::WorkerMessage { kind: Some(kind) }).await.ok()
}
