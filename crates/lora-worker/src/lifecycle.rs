//! When training stops without a word of the coordinator, and when the worker ends.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::directive::DesiredState;
use crate::status::CurrentJob;

/// Watches over a worker that is left alone, and over its end.
pub(crate) struct Lifecycle {
    pub(crate) desired: watch::Sender<DesiredState>,
    pub(crate) status: watch::Receiver<Option<CurrentJob>>,
    pub(crate) connected: watch::Receiver<bool>,
    pub(crate) draining: watch::Sender<bool>,
    pub(crate) orphan_timeout: Duration,
    pub(crate) drain_timeout: Duration,
}

impl Lifecycle {
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
            () = self.stop_orphaned_training() => {}
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
                () = self.stop_without_coordinator() => tracing::info!("no coordinator, nothing more to do"),
            }
        };
        if timeout(self.drain_timeout, drained).await.is_err() {
            tracing::warn!(after = ?self.drain_timeout, "ending without having been let go of");
        }
    }

    /// With nobody there who would let the job go: returns once the engine does nothing by itself any more.
    async fn stop_without_coordinator(&self) {
        let (mut connected, mut status) = (self.connected.clone(), self.status.clone());
        loop {
            // The channels' other ends live as long as the worker.
            let _ = connected.wait_for(|connected| !connected).await;
            self.desired.send_if_modified(DesiredState::stop_training);
            tokio::select! {
                _ = status.wait_for(|job| job.as_ref().is_none_or(|job| !job.is_busy())) => return,
                _ = connected.wait_for(|connected| *connected) => {}
            }
        }
    }

    /// Stops training where the coordinator stays away. Never returns.
    async fn stop_orphaned_training(&self) {
        let mut connected = self.connected.clone();
        loop {
            let _ = connected.wait_for(|connected| !connected).await;
            tokio::select! {
                _ = connected.wait_for(|connected| *connected) => continue,
                () = sleep(self.orphan_timeout) => {}
            }
            if self.desired.send_if_modified(DesiredState::stop_training) {
                let after = self.orphan_timeout;
                tracing::warn!(?after, "no coordinator for too long, training stops after this step");
            }
            let _ = connected.wait_for(|connected| *connected).await;
        }
    }
}
