//! Shutdown by signals.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// The shutdown requests by SIGTERM and SIGINT, until this is dropped.
#[derive(Debug)]
pub struct ShutdownSignals {
    /// Graceful shutdown: cancelled by the first signal.
    pub stop: CancellationToken,
    /// Immediate shutdown: cancelled by the second signal.
    pub immediate: CancellationToken,
    _listening: AbortOnDropHandle<()>,
}

/// Listens for SIGTERM and SIGINT. Must be called in a tokio runtime.
///
/// # Errors
/// The operating system does not accept a signal handler.
pub fn shutdown_signals() -> io::Result<ShutdownSignals> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, immediate) = (CancellationToken::new(), CancellationToken::new());
    let tokens = [stop.clone(), immediate.clone()];
    let listening = tokio::spawn(async move {
        for token in tokens {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            tracing::info!(signal = name, "received a shutdown signal");
            token.cancel();
        }
    });
    Ok(ShutdownSignals { stop, immediate, _listening: AbortOnDropHandle::new(listening) })
}
