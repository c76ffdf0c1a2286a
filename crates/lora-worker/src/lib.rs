//! The daemon on a device: brings the job that it holds in line with the coordinator's newest
//! directive, and reports its state.
//!
//! The engine blocks and has its own thread, which compares the desired state with the observed
//! state. The async session stores the desired state that the coordinator sends, and reports the
//! observed state. Two watch channels connect engine and session, so that neither waits for the
//! other and no message can be missed. Only the metrics of finished steps are buffered, until the
//! coordinator has stored them.
//!
//! Without a coordinator, training continues. After `orphan_timeout_seconds` it stops at a step
//! boundary, and the worker keeps the state.
//!
//! The crate may use everything but the coordinator and loractl. To read it, begin with `session`
//! for the protocol, and with `engine` for the thread that trains.

mod address;
mod backoff;
mod config;
mod directive;
mod end_with_stdin;
mod engine;
mod error;
mod fetch;
mod lifecycle;
mod memory;
mod metrics;
pub mod probe;
mod session;
mod status;
mod step_outbox;
mod uploads;

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use lora_collective::PeerListener;
use lora_collective::backend_choice::Collective;
use lora_daemon::http::{self, Health};
use lora_spec::FieldError;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::address::PeerAddress;
use crate::directive::DesiredState;
use crate::engine::EngineContext;
use crate::fetch::InputFetcher;
use crate::lifecycle::Lifecycle;
use crate::memory::job_memory;
use crate::metrics::{Counters, DeviceMemoryGauges, Gauges};
use crate::session::Session;
use crate::step_outbox::StepOutbox;

pub use config::{CacheConfig, Config, PeerConfig};
pub use end_with_stdin::end_with_stdin;
pub use error::WorkerError;
pub use memory::machine_memory;

/// The time limit of one attempt to connect to the coordinator.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The interval of keepalive pings to an idle coordinator. Without an answer within
/// [`KEEPALIVE_TIMEOUT`] the connection is closed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the engine may take to release its job when the worker ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs a worker until it is asked to end. `stop` drains it: it ends once the coordinator has
/// released it. `immediate` ends it without waiting. If the coordinator cannot be reached, the
/// worker waits for it.
///
/// The thread pool belongs to the process, so all workers of a process must have the same
/// `threads`.
///
/// # Errors
/// The error that prevents the worker from starting, or that ends it.
pub async fn run(
    config: Config,
    stop: CancellationToken,
    immediate: CancellationToken,
) -> Result<(), WorkerError> {
    use_threads(config.threads)?;
    let device = lora_train::open_device(config.device).map_err(WorkerError::Device)?;
    if config.collective == Collective::Nccl && device.is_cpu() {
        let message =
            "is \"nccl\", which needs a GPU, but this worker computes on the CPU; it must be auto or tcp";
        return Err(FieldError::new("collective", message.into()).into());
    }
    let numerics_id = lora_train::numerics_id(&device).map_err(WorkerError::Device)?;
    let memory = job_memory(&device, config.memory).map_err(WorkerError::Device)?;
    tracing::info!(numerics = numerics_id, memory = memory.known_bytes(), "device opened");
    let (channel, coordinator) = channel(&config)?;
    let fetcher = InputFetcher::open(&config.cache_dir, config.cache.max_bytes, config.model_roots.clone())
        .map_err(|error| WorkerError::Cache(error.to_string()))?;
    let (listener, listening) = listen_for_peers(&config.peer.listen)?;
    let http = listen_for_http(&config).await?;
    let http_address = http.as_ref().and_then(|listener| listener.local_addr().ok());
    tracing::info!(peer = %listening, http = http_address.map(tracing::field::display), "listening");

    let (desired, desired_now) = watch::channel(DesiredState::none());
    let (limits, limits_now) = watch::channel(None);
    let (status, status_now) = watch::channel(None);
    let (connected, connected_now) = watch::channel(false);
    let (draining, draining_now) = watch::channel(false);
    let (steps, counters, gauges) = (StepOutbox::default(), Counters::default(), Gauges::default());
    let used = DeviceMemoryGauges::for_device(&device);
    let engine = EngineContext {
        listener,
        device,
        collective: config.collective,
        used: used.clone(),
        memory,
        channel: channel.clone(),
        fetcher,
        desired: desired_now,
        limits: limits_now,
        status,
        steps: steps.clone(),
        counters: counters.clone(),
    };
    let mut ended = engine.start().map_err(WorkerError::Thread)?;
    let advertised = Some(config.peer.advertise_address.clone()).filter(|address| !address.is_empty());
    let session = Session {
        channel,
        name: config.worker_name(),
        instance_id: format!("{:032x}", rand::random::<u128>()),
        numerics_id,
        address: PeerAddress { advertised, listening, coordinator },
        memory,
        steps,
        desired: desired.clone(),
        limits,
        status: status_now.clone(),
        draining: draining_now,
        connected,
        term: 0,
    };
    let lifecycle = Lifecycle {
        desired: desired.clone(),
        status: status_now.clone(),
        connected: connected_now.clone(),
        draining,
        orphan_timeout: config.orphan_timeout(),
        drain_timeout: config.drain_timeout(),
    };
    let (health, mut registry) = (Health::default(), Registry::default());
    gauges.register(&counters, &mut registry);
    if let Some(used) = &used {
        used.register(&mut registry);
    }
    let ending = CancellationToken::new();
    let serving = async {
        if let Some(listener) = http
            && let Err(error) = http::serve(listener, registry, health.clone(), ending.clone()).await
        {
            tracing::error!(%error, "cannot serve health and metrics any longer");
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = session.run(ending.clone()) => {}
        () = lifecycle.run(stop, immediate, &ending) => {}
        () = gauges.follow(status_now, connected_now, &health) => {}
        () = serving => {}
        error = ended.recv() => return Err(error.unwrap_or(WorkerError::EngineEnded)),
    }
    desired.send_replace(DesiredState::none());
    drop(desired);
    // If the engine does not end in time, it ends with the process.
    let _ = timeout(SHUTDOWN_TIMEOUT, ended.recv()).await;
    Ok(())
}

/// Creates the channel to the coordinator, which connects on first use, and returns it with the
/// coordinator's URI.
fn channel(config: &Config) -> Result<(Channel, tonic::transport::Uri), WorkerError> {
    let wrong = |error: &dyn std::fmt::Display| {
        FieldError::new("coordinator", format!("is {:?}: {error}", config.coordinator))
    };
    let endpoint = Endpoint::from_shared(config.coordinator.clone()).map_err(|error| wrong(&error))?;
    let uri = endpoint.uri().clone();
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok((endpoint.connect_lazy(), uri))
}

fn listen_for_peers(address: &str) -> Result<(PeerListener, SocketAddr), WorkerError> {
    let bound = PeerListener::bind(address).and_then(|listener| {
        let address = listener.local_addr()?;
        Ok((listener, address))
    });
    bound.map_err(cannot_listen("peer.listen", address))
}

async fn listen_for_http(config: &Config) -> Result<Option<TcpListener>, WorkerError> {
    let Some(address) = config.http.address()? else { return Ok(None) };
    let bound = TcpListener::bind(address).await;
    bound.map(Some).map_err(cannot_listen("http.listen", &config.http.listen))
}

fn cannot_listen(setting: &'static str, address: &str) -> impl FnOnce(io::Error) -> WorkerError {
    let address = address.to_owned();
    move |source| WorkerError::Listen { setting, address, source }
}

fn use_threads(threads: usize) -> Result<(), WorkerError> {
    let Err(error) = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global() else {
        return Ok(());
    };
    // An error without a source means that the process already has a thread pool.
    let cause = match error.source() {
        Some(source) => source.to_string(),
        None if threads == 0 || rayon::current_num_threads() == threads => return Ok(()),
        None => format!("this process already computes with {}", rayon::current_num_threads()),
    };
    Err(WorkerError::Threads { threads, cause })
}
