use std::io;
use std::time::Duration;

use lora_spec::FieldError;
use lora_train::TrainError;

/// The reason why a worker could not start or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A setting is invalid.
    #[error(transparent)]
    Setting(#[from] FieldError),
    /// An address cannot be listened on.
    #[error("{setting}: cannot listen on {address}: {source}")]
    Listen {
        /// The setting.
        setting: &'static str,
        /// Its value.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// The thread pool for computing cannot be started.
    #[error("threads: cannot start {threads} threads for computing: {cause}")]
    Threads {
        /// The requested number of threads.
        threads: usize,
        /// The cause.
        cause: String,
    },
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// The device cannot be used, or can no longer be used. Only another process can use it again.
    #[error(transparent)]
    Device(TrainError),
    /// The device does not finish its work after it was cancelled.
    #[error("the device did not answer for {} s after its work was cancelled", .0.as_secs())]
    Stuck(Duration),
    /// The engine's thread ended by itself, which is a bug.
    #[error("the engine's thread has ended")]
    EngineEnded,
    /// The cache directory cannot be used.
    #[error("cache_dir: {0}")]
    Cache(String),
}
