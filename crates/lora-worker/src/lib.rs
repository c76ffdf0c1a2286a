//! A worker: takes assignments from the coordinator, runs the engine and reports.
//!
//! The engine blocks and has a thread of its own. The session, which is async, talks to the coordinator and passes reports and
//! files on. Between them are bounded channels, so a coordinator that is slow slows the engine down, and nothing piles up.

mod assignment;
mod engine;
mod error;
mod session;
mod transfer;

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};

use lora_collective::PeerListener;
use tokio_util::sync::CancellationToken;

use crate::engine::Engine;

pub use error::WorkerError;

/// Settings of a worker.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the coordinator serves gRPC: `http://host:port`.
    pub coordinator: String,
    /// Name that people see; no other connected worker has it.
    pub name: String,
    /// Where it takes connections of other workers; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Threads that compute.
    pub threads: usize,
}

impl Options {
    /// A worker that listens on a free port of loopback.
    pub fn local(coordinator: String, name: String, threads: usize) -> Self {
        Self { coordinator, name, listen: (Ipv4Addr::LOCALHOST, 0).into(), threads }
    }
}

/// Works until the coordinator says to end, or `stop` does. A lost coordinator is an error.
///
/// The number of threads is the process's, so workers in one process must have the same.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), WorkerError> {
    let Options { coordinator, name, listen, threads } = options;
    use_threads(threads)?;
    let bind = |source| WorkerError::Listen { address: listen, source };
    let listener = PeerListener::bind(listen).map_err(bind)?;
    let peer_address = listener.local_addr().map_err(bind)?.to_string();
    let channel = session::connect(&coordinator).await?;
    let engine = Engine::start(listener).map_err(WorkerError::Thread)?;
    session::serve(channel, name, peer_address, engine, stop).await
}

fn use_threads(threads: usize) -> Result<(), WorkerError> {
    let Err(error) = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global() else {
        return Ok(());
    };
    // Without a source, the error is that the process has its threads already.
    let cause = match error.source() {
        Some(source) => source.to_string(),
        None if rayon::current_num_threads() == threads => return Ok(()),
        None => format!("this process computes with {} already", rayon::current_num_threads()),
    };
    Err(WorkerError::Threads { threads, cause })
}
