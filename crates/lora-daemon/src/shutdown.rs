//! Shutdown by signals.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// What SIGTERM and SIGINT ask for, as long as this lives.
#[derive(Debug)]
pub struct ShutdownSignals {
    /// End in good order: cancelled by the first signal.
    pub stop: CancellationToken,
    /// End at once: cancelled by the second one.
    pub immediate: CancellationToken,
    _listening: AbortOnDropHandle<()>,
}

/// Listens for SIGTERM and SIGINT. To be called in a tokio runtime.
///
/// # Errors
/// What the operating system says.
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
            tracing::info!(signal = name, "asked to end");
            token.cancel();
        }
    });
    Ok(ShutdownSignals { stop, immediate, _listening: AbortOnDropHandle::new(listening) })
}
