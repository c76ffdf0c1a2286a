use std::io;
use std::time::Duration;

use lora_spec::FieldError;
use lora_train::TrainError;

/// Why a worker could not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A setting is wrong.
    #[error(transparent)]
    Setting(#[from] FieldError),
    /// An address cannot be listened on.
    #[error("{setting}: cannot listen on {address}: {source}")]
    Listen {
        /// The setting.
        setting: &'static str,
        /// Its value.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// The threads that compute cannot be started.
    #[error("threads: cannot compute with {threads}: {cause}")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// Why not.
        cause: String,
    },
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// The device cannot be used, or not any more: only another process can use it again.
    #[error(transparent)]
    Device(TrainError),
    /// The device does not come to an end with what it was asked for.
    #[error("the device did not answer for {} s after its work was cancelled", .0.as_secs())]
    Stuck(Duration),
    /// A bug: the engine's thread has ended by itself.
    #[error("the engine's thread has ended")]
    EngineEnded,
    /// The cache of files cannot be used.
    #[error("cache_dir: {0}")]
    Cache(String),
}
