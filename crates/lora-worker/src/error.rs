use std::io;
use std::net::SocketAddr;

use tonic::Status;

/// Why a worker could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The address for peers cannot be taken.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The threads that compute cannot be started.
    #[error("cannot compute with {threads} threads: {cause}")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// Why not.
        cause: String,
    },
    /// The engine's thread cannot be started.
    #[error("cannot start the engine's thread: {0}")]
    Thread(#[source] io::Error),
    /// The coordinator cannot be reached.
    #[error("cannot reach the coordinator at {address}: {source}")]
    Unreachable {
        /// Its address.
        address: String,
        /// Why not.
        source: tonic::transport::Error,
    },
    /// The coordinator refuses this worker.
    #[error("the coordinator refused this worker: {message}", message = .0.message())]
    Refused(Box<Status>),
    /// The coordinator is gone.
    #[error("lost the coordinator: {0}")]
    Lost(String),
    /// A bug: the task of an assignment panicked.
    #[error("an assignment's task broke: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// The coordinator sent something that makes no sense.
    #[error("the coordinator broke the protocol: {0}")]
    Protocol(String),
}
