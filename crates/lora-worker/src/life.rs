//! When training stops without a word of the coordinator, and when the worker ends.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::status::Held;
use crate::wanted::Wanted;

/// Watches over a worker that is left alone, and over its end.
pub(crate) struct Life {
    pub(crate) wanted: watch::Sender<Wanted>,
    pub(crate) status: watch::Receiver<Option<Held>>,
    pub(crate) connected: watch::Receiver<bool>,
    pub(crate) draining: watch::Sender<bool>,
    pub(crate) orphan_timeout: Duration,
    pub(crate) drain_timeout: Duration,
}

impl Life {
    /// Cancels `ending` when the worker is to end, and never returns: its end is the session's.
    pub(crate) async fn run(
        self,
        stop: CancellationToken,
        immediate: CancellationToken,
        ending: &CancellationToken,
    ) {
        tokio::select! {
            () = immediate.cancelled() => tracing::info!("ending at once"),
            () = self.drain(stop) => {}
            () = self.watch_over_orphans() => {}
        }
        ending.cancel();
        std::future::pending().await
    }

    /// Returns once `stop` is cancelled and the worker is let go of, or may end all the same.
    async fn drain(&self, stop: CancellationToken) {
        stop.cancelled().await;
        tracing::info!("draining");
        self.draining.send_replace(true);
        let mut status = self.status.clone();
        let drained = async {
            tokio::select! {
                _ = status.wait_for(Option::is_none) => tracing::info!("let go of"),
                () = self.stop_alone() => tracing::info!("no coordinator, nothing more to do"),
            }
        };
        if timeout(self.drain_timeout, drained).await.is_err() {
            tracing::warn!(after = ?self.drain_timeout, "ending without having been let go of");
        }
    }

    /// With nobody there who would let the job go: returns once the engine does nothing by itself any more.
    async fn stop_alone(&self) {
        let (mut connected, mut status) = (self.connected.clone(), self.status.clone());
        loop {
            // The channels' other ends live as long as the worker.
            let _ = connected.wait_for(|connected| !connected).await;
            self.wanted.send_if_modified(Wanted::stop_training);
            tokio::select! {
                _ = status.wait_for(|held| held.as_ref().is_none_or(|held| !held.is_busy())) => return,
                _ = connected.wait_for(|connected| *connected) => {}
            }
        }
    }

    /// Stops training where the coordinator stays away. Never returns.
    async fn watch_over_orphans(&self) {
        let mut connected = self.connected.clone();
        loop {
            let _ = connected.wait_for(|connected| !connected).await;
            tokio::select! {
                _ = connected.wait_for(|connected| *connected) => continue,
                () = sleep(self.orphan_timeout) => {}
            }
            if self.wanted.send_if_modified(Wanted::stop_training) {
                let after = self.orphan_timeout;
                tracing::warn!(?after, "no coordinator for too long, training stops after this step");
            }
            let _ = connected.wait_for(|connected| *connected).await;
        }
    }
}
