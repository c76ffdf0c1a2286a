//! A worker: it holds and does what the coordinator's newest directive says, and tells what it holds.
//!
//! The engine blocks and has a thread of its own, which compares what is wanted with what is held. The session, which is
//! async, writes down what is wanted and tells what is held; between them are two watched values, so that nobody waits for
//! the other and no message can be missed. Only finished steps are kept until the coordinator has stored them.
//!
//! Without a coordinator training goes on; after a while it stops at a step boundary, and the state is held.

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
use crate::memory::MemoryLimit;
use crate::metrics::{Counters, DeviceMemoryGauges, Gauges};
use crate::session::Session;
use crate::step_outbox::StepOutbox;

pub use config::{CacheConfig, Config, PeerConfig};
pub use end_with_stdin::end_with_stdin;
pub use error::WorkerError;
pub use memory::machine_memory;

/// The limit of one attempt to connect with the coordinator.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A silent coordinator is asked for a sign of life this often, and given up when none comes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the engine may take to let go of everything when the worker ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// Works until asked to end: by `stop` once it is let go of, by `immediate` without waiting. A coordinator that is away is
/// waited for.
///
/// The number of threads is the process's, so workers in one process must have the same.
///
/// # Errors
/// What keeps it from starting, or from working.
pub async fn run(
    config: Config,
    stop: CancellationToken,
    immediate: CancellationToken,
) -> Result<(), WorkerError> {
    use_threads(config.threads)?;
    let device = lora_train::open_device(config.device).map_err(WorkerError::Device)?;
    if config.collective == Collective::Nccl && device.is_cpu() {
        let message =
            "is \"nccl\", which is for GPUs, and this worker computes on the CPU; it must be auto or tcp";
        return Err(FieldError::new("collective", message.into()).into());
    }
    let numerics_id = lora_train::numerics_id(&device).map_err(WorkerError::Device)?;
    let memory = MemoryLimit::for_device(&device, config.memory).map_err(WorkerError::Device)?;
    tracing::info!(numerics = numerics_id, memory = memory.bytes, "computing");
    let (channel, coordinator) = channel(&config)?;
    let fetcher = InputFetcher::open(&config.cache_dir, config.cache.max_bytes, config.model_roots.clone())
        .map_err(|error| WorkerError::Cache(error.to_string()))?;
    let (listener, listening) = listen_for_peers(&config.peer.listen)?;
    let http = listen_for_http(&config).await?;
    let http_address = http.as_ref().and_then(|listener| listener.local_addr().ok());
    tracing::info!(peer = %listening, http = http_address.map(tracing::field::display), "listening");

    let (desired, wanted_now) = watch::channel(DesiredState::none());
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
        desired: wanted_now,
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
        status: status_now.clone(),
        draining: draining_now,
        connected,
        term: 0,
    };
    let life = Lifecycle {
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
            tracing::error!(%error, "health and metrics are not served any more");
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = session.run(ending.clone()) => {}
        () = life.run(stop, immediate, &ending) => {}
        () = gauges.follow(status_now, connected_now, &health) => {}
        () = serving => {}
        lost = ended.recv() => return Err(lost.unwrap_or(WorkerError::EngineEnded)),
    }
    desired.send_replace(DesiredState::none());
    drop(desired);
    // An engine that does not end in time is left to the end of the process.
    let _ = timeout(SHUTDOWN_TIMEOUT, ended.recv()).await;
    Ok(())
}

/// The channel to the coordinator, which connects when it is used; and where that is.
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
    // Without a source, the error is that the process has its threads already.
    let cause = match error.source() {
        Some(source) => source.to_string(),
        None if threads == 0 || rayon::current_num_threads() == threads => return Ok(()),
        None => format!("this process computes with {} already", rayon::current_num_threads()),
    };
    Err(WorkerError::Threads { threads, cause })
}
