//! The coordinator as a whole: its servers, its tasks, and its end.

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

/// Commands that may wait for the service; callers beyond it wait for room.
const COMMAND_QUEUE_CAPACITY: usize = 256;
/// A silent connection is asked for a sign of life this often, and given up when none comes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long calls and streams may take to end at shutdown; what is left then is cut off.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);
/// How long reads of the store may take to end after that.
const LAST_READS: Duration = Duration::from_secs(1);
/// How often the store is maintained.
const MAINTENANCE: Duration = Duration::from_secs(600);

/// Why a coordinator cannot start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// A setting.
    #[error(transparent)]
    Config(#[from] FieldError),
    /// Another coordinator uses the state directory.
    #[error("state_dir: {0} is in use by another coordinator")]
    InUse(PathBuf),
    /// The database and the files in the state directory do not belong together.
    #[error("state_dir: {0}")]
    NotOwner(String),
    /// The state directory or the database.
    #[error("the store: {0}")]
    Store(String),
    /// An address cannot be taken.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A server broke.
    #[error("the server broke: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// A bug: a task panicked.
    #[error("a task of the coordinator broke: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// A bug: the descriptors of the interface cannot be served.
    #[error("reflection: {0}")]
    Reflection(String),
    /// A second signal.
    #[error("asked to end at once before everything had ended")]
    CutOff,
    /// The HTTP server broke.
    #[error("the HTTP server broke: {0}")]
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

/// A coordinator that holds its store and its addresses, and does not serve yet.
pub struct Coordinator {
    config: Config,
    store: Store,
    grpc: TcpListener,
    http: Option<TcpListener>,
    handle: Handle,
}

/// Where a coordinator is reached, and how it is ended.
#[derive(Debug, Clone)]
pub struct Handle {
    address: SocketAddr,
    stop: CancellationToken,
}

impl Handle {
    /// The address it serves gRPC on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends the coordinator. Jobs stay as they are in the store, and workers train on.
    pub fn shutdown(&self) {
        self.stop.cancel();
    }
}

/// Runs a coordinator until `stop`, and then for as long as it takes to end in good order, unless `immediate` comes before.
///
/// # Errors
/// What keeps it from starting, or from serving.
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
    /// Opens the store and takes the addresses.
    pub async fn bind(config: &Config) -> Result<Self, CoordinatorError> {
        config.check()?;
        let retention =
            Retention { events: config.limits.retained_events, steps: config.limits.retained_steps };
        let state_dir = std::path::absolute(&config.state_dir)
            .map_err(|error| FieldError::new("state_dir", format!("is no path: {error}")))?;
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

    /// A handle to it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Serves until [`Handle::shutdown`]. If the service's task breaks, everything ends with it.
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
        match timeout(LAST_READS, store.finish()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the database's log is not moved into its file"),
            Err(_) => tracing::warn!("the database is still being read; its log is not moved into its file"),
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
    let welcome =
        v1::Welcome { term: store.term(), heartbeat_seconds: config.workers.heartbeat().as_secs_f64() };
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

/// Maintains the store from time to time. An error is tried again the next time.
async fn maintain_regularly(store: Store, limits: LimitsConfig, stop: CancellationToken) {
    // Not at once, so that a start with a wrong database can be ended before anything is removed.
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

/// Removes files that have been unreferenced or unknown for long enough, and moves the database's
/// log into its file.
pub(crate) async fn maintain(store: &Store, limits: &LimitsConfig) {
    match store.collect_garbage(limits.unreferenced()).await {
        Ok(0) => {}
        Ok(files) => tracing::info!(files, "unreferenced files removed"),
        Err(error) => tracing::error!(%error, "unreferenced files are not removed"),
    }
    match store.remove_unknown_objects(limits.unknown_objects()).await {
        Ok(UnknownObjects { found: 0, removed: 0 }) => {}
        Ok(UnknownObjects { found, removed }) => {
            tracing::warn!(found, removed, "files without a row in the database");
        }
        Err(error) => tracing::error!(%error, "files without a row are not removed"),
    }
    if let Err(error) = store.checkpoint_wal().await {
        tracing::error!(%error, "the database's log is not moved into its file");
    }
}
