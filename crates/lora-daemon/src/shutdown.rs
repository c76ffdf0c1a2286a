//! Shutdown by signals.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// What SIGTERM and SIGINT ask for, as long as this lives.
#[derive(Debug)]
pub struct Signals {
    /// End in good order: cancelled by the first signal.
    pub stop: CancellationToken,
    /// End at once: cancelled by the second one.
    pub at_once: CancellationToken,
    _listening: AbortOnDropHandle<()>,
}

/// Listens for SIGTERM and SIGINT. To be called in a tokio runtime.
///
/// # Errors
/// What the operating system says.
pub fn signals() -> io::Result<Signals> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, at_once) = (CancellationToken::new(), CancellationToken::new());
    let tokens = [stop.clone(), at_once.clone()];
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
    Ok(Signals { stop, at_once, _listening: AbortOnDropHandle::new(listening) })
}
