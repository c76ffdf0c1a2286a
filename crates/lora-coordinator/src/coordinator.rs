//! The coordinator process: servers, background tasks, and shutdown.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use lora_daemon::http::{self, Health};
use lora_daemon::incoming::incoming;
use lora_proto::v1::artifacts_server::ArtifactsServer;
use lora_proto::v1::fine_tuning_server::FineTuningServer;
use lora_proto::v1::worker_control_server::WorkerControlServer;
use lora_proto::{DESCRIPTORS, MAX_MESSAGE_BYTES, v1};
use lora_spec::FieldError;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;

use crate::Config;
use crate::config::LimitsConfig;
use crate::metrics::Metrics;
use crate::rpc::{Artifacts, Commands, FineTuning, WorkerControl};
use crate::service::Service;
use crate::store::{ForeignObjects, Retention, Store, StoreError, UnknownObjects};

/// The capacity of the command queue of the service; if the queue is full, callers wait.
const COMMAND_QUEUE_CAPACITY: usize = 256;
/// The interval between HTTP/2 keepalive pings on a connection.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// The time after which a connection without an answer to a ping is closed.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// The time that calls and streams may take to end at shutdown; those that remain are aborted.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);
/// The time that reads and commits of the store may take to end after that.
const LAST_WORK: Duration = Duration::from_secs(1);
/// The time that the disk may take after that to move the database's log into its file.
const LAST_LOG_MOVE: Duration = Duration::from_secs(10);
/// The time within which a coordinator ends that is shut down.
pub const SHUTDOWN_LIMIT: Duration = SHUTDOWN_TIMEOUT.saturating_add(LAST_WORK).saturating_add(LAST_LOG_MOVE);
/// The interval between two rounds of maintenance of the store.
const MAINTENANCE: Duration = Duration::from_secs(600);

/// Why a coordinator cannot start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// A setting is invalid.
    #[error(transparent)]
    Config(#[from] FieldError),
    /// Another coordinator uses the state directory.
    #[error("state_dir: {0} is in use by another coordinator")]
    InUse(PathBuf),
    /// The database and the files in the state directory do not belong together.
    #[error("state_dir: {0}")]
    NotOwner(String),
    /// The state directory or the database cannot be read or written.
    #[error("the store: {0}")]
    Store(String),
    /// An address cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// The gRPC server failed.
    #[error("the gRPC server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// A bug: a task panicked.
    #[error("a task of the coordinator failed: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// A bug: the reflection service cannot use the descriptors of the interface.
    #[error("reflection: {0}")]
    Reflection(String),
    /// A second signal ended the process before the shutdown was complete.
    #[error("a second signal ended the coordinator before its shutdown was complete")]
    CutOff,
    /// The HTTP server failed.
    #[error("the HTTP server failed: {0}")]
    Http(std::io::Error),
}

impl From<StoreError> for CoordinatorError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::InUse(dir) => Self::InUse(dir),
            StoreError::NotOwner { .. } | StoreError::NoObjects { .. } | StoreError::ForeignWal(_) => {
                Self::NotOwner(error.to_string())
            }
            other => Self::Store(other.to_string()),
        }
    }
}

/// A coordinator with an open store and bound addresses that does not serve yet.
pub struct Coordinator {
    config: Config,
    store: Store,
    grpc: TcpListener,
    http: Option<TcpListener>,
    handle: Handle,
}

/// The address of a coordinator, and the means to shut it down.
#[derive(Debug, Clone)]
pub struct Handle {
    address: SocketAddr,
    stop: CancellationToken,
}

impl Handle {
    /// The address of the gRPC server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends the coordinator. Jobs keep their state in the store, and workers continue to train.
    pub fn shutdown(&self) {
        self.stop.cancel();
    }
}

/// Runs a coordinator until `stop`, then shuts it down in order. `immediate` aborts the shutdown.
///
/// # Errors
/// The coordinator cannot start, a server or a task fails, or `immediate` aborted the shutdown.
pub async fn run(
    config: Config,
    stop: CancellationToken,
    immediate: CancellationToken,
) -> Result<(), CoordinatorError> {
    let coordinator = Coordinator::bind(&config).await?;
    let handle = coordinator.handle();
    let stopping = async {
        stop.cancelled().await;
        tracing::info!("shutting down");
        handle.shutdown();
        immediate.cancelled().await;
    };
    tokio::select! {
        served = coordinator.serve() => served,
        () = stopping => Err(CoordinatorError::CutOff),
    }
}

impl Coordinator {
    /// Opens the store and binds the addresses.
    pub async fn bind(config: &Config) -> Result<Self, CoordinatorError> {
        config.check()?;
        let retention =
            Retention { events: config.limits.retained_events, steps: config.limits.retained_steps };
        let state_dir = std::path::absolute(&config.state_dir)
            .map_err(|error| FieldError::new("state_dir", format!("is not a path: {error}")))?;
        let foreign = match config.adopt_objects {
            true => ForeignObjects::Adopt,
            false => ForeignObjects::Refuse,
        };
        let store = Store::open(&state_dir, retention, foreign).await?;
        let grpc = listen(&config.grpc.listen).await?;
        let http = match config.http.listen.as_str() {
            "" => None,
            address => Some(listen(address).await?),
        };
        let at = |source| CoordinatorError::Listen { address: config.grpc.listen.clone(), source };
        let address = grpc.local_addr().map_err(at)?;
        let handle = Handle { address, stop: CancellationToken::new() };
        Ok(Self { config: config.clone(), store, grpc, http, handle })
    }

    /// A handle to this coordinator.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Serves until [`Handle::shutdown`]. If the task of the service ends, everything else ends
    /// too.
    pub async fn serve(self) -> Result<(), CoordinatorError> {
        let Self { config, store, grpc, http, handle } = self;
        let stop = handle.stop;
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        let health = Health::default();
        let http_address = http.as_ref().and_then(|http| http.local_addr().ok());
        let (sender, receiver) = mpsc::channel(COMMAND_QUEUE_CAPACITY);
        let service = Service::new(store.clone(), config.clone(), receiver, metrics).await?;
        let service = tokio::spawn({
            let stop = stop.clone();
            async move {
                let _stop_all = stop.clone().drop_guard();
                service.run(stop).await;
            }
        });
        let http = tokio::spawn({
            let (health, stop) = (health.clone(), stop.clone());
            async move {
                match http {
                    Some(listener) => http::serve(listener, registry, health, stop).await,
                    None => Ok(()),
                }
            }
        });
        let maintenance =
            tokio::spawn(maintain_regularly(store.clone(), config.limits.clone(), stop.clone()));
        let sessions = TaskTracker::new();
        tracing::info!(
            address = %handle.address,
            http = http_address.map(|address| address.to_string()).unwrap_or_default(),
            term = store.term(),
            "listening"
        );
        health.set_ready(true, "");
        let served = serve_grpc(&config, &store, Commands::new(sender), grpc, &sessions, &stop).await;
        stop.cancel();
        health.set_ready(false, "shutting down");
        sessions.close();
        service.await?;
        sessions.wait().await;
        maintenance.await?;
        http.await?.map_err(CoordinatorError::Http)?;
        let reads_ended = timeout(LAST_WORK, store.end_work()).await.is_ok();
        match timeout(LAST_LOG_MOVE, store.truncate_wal()).await {
            Ok(Ok(true)) => {}
            Ok(Err(error)) => tracing::error!(%error, "cannot move the database's log into its file"),
            Ok(Ok(false)) | Err(_) => {
                tracing::warn!(reads_ended, "the database's log is not moved into its file");
            }
        }
        served
    }
}

async fn listen(address: &str) -> Result<TcpListener, CoordinatorError> {
    let failed = |source| CoordinatorError::Listen { address: address.to_owned(), source };
    TcpListener::bind(address).await.map_err(failed)
}

async fn serve_grpc(
    config: &Config,
    store: &Store,
    commands: Commands,
    listener: TcpListener,
    sessions: &TaskTracker,
    stop: &CancellationToken,
) -> Result<(), CoordinatorError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<FineTuningServer<FineTuning>>().await;
    reporter.set_serving::<WorkerControlServer<WorkerControl>>().await;
    reporter.set_serving::<ArtifactsServer<Artifacts>>().await;
    let welcome = v1::Welcome {
        term: store.term(),
        heartbeat_seconds: config.workers.heartbeat_seconds,
        forming_seconds: config.recovery.forming_seconds,
        step_seconds: config.recovery.step_seconds,
    };
    let control = WorkerControl::new(commands.clone(), welcome, config.workers.lease(), sessions.clone());
    let reflected = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let reflection = |error: tonic_reflection::server::Error| CoordinatorError::Reflection(error.to_string());
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(health)
        .add_service(reflected().build_v1().map_err(reflection)?)
        .add_service(reflected().build_v1alpha().map_err(reflection)?)
        .add_service(
            FineTuningServer::new(FineTuning::new(commands, store.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(WorkerControlServer::new(control).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(
            ArtifactsServer::new(Artifacts::new(store.clone(), config.limits.upload_bytes))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .serve_with_incoming_shutdown(incoming(listener), stop.clone().cancelled_owned());
    let mut server = Box::pin(server);
    tokio::select! {
        served = &mut server => served?,
        () = stop.cancelled() => {
            store.close();
            timeout(SHUTDOWN_TIMEOUT, server).await.unwrap_or(Ok(()))?;
        }
    }
    Ok(())
}

/// Maintains the store at regular intervals. After an error, the next round tries again.
async fn maintain_regularly(store: Store, limits: LimitsConfig, stop: CancellationToken) {
    // The first round comes after an interval, so that a coordinator that was started with a wrong
    // database can be stopped before it removes anything.
    let mut ticks = interval_at(Instant::now() + MAINTENANCE, MAINTENANCE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        maintain(&store, &limits).await;
    }
}

/// Removes files that have been unreferenced or without a row for longer than `limits` allow, and
/// moves the database's log into its file.
pub(crate) async fn maintain(store: &Store, limits: &LimitsConfig) {
    match store.collect_garbage(limits.unreferenced()).await {
        Ok(0) => {}
        Ok(files) => tracing::info!(files, "unreferenced files removed"),
        Err(error) => tracing::error!(%error, "cannot remove unreferenced files"),
    }
    match store.remove_unknown_objects(limits.unknown_objects()).await {
        Ok(UnknownObjects { found: 0, removed: 0 }) => {}
        Ok(UnknownObjects { found, removed }) => {
            tracing::warn!(found, removed, "files without a row in the database");
        }
        Err(error) => tracing::error!(%error, "cannot remove files without a row"),
    }
    if let Err(error) = store.checkpoint_wal().await {
        tracing::error!(%error, "cannot move the database's log into its file");
    }
}
