//! When training stops without a directive of the coordinator, and when the worker ends.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::directive::DesiredState;
use crate::status::CurrentJob;

/// Stops the training of a worker without a coordinator, and decides when the worker ends.
pub(crate) struct Lifecycle {
    pub(crate) desired: watch::Sender<DesiredState>,
    pub(crate) status: watch::Receiver<Option<CurrentJob>>,
    pub(crate) connected: watch::Receiver<bool>,
    pub(crate) draining: watch::Sender<bool>,
    pub(crate) orphan_timeout: Duration,
    pub(crate) drain_timeout: Duration,
}

impl Lifecycle {
    /// Cancels `ending` when the worker must end. Never returns: the worker ends with its session.
    pub(crate) async fn run(
        self,
        stop: CancellationToken,
        immediate: CancellationToken,
        ending: &CancellationToken,
    ) {
        tokio::select! {
            () = immediate.cancelled() => tracing::info!("shutting down without draining"),
            () = self.drain(stop) => {}
            () = self.stop_orphaned_training() => {}
        }
        ending.cancel();
        std::future::pending().await
    }

    /// Returns once `stop` is cancelled and the coordinator has released the worker, or once the
    /// worker may end without that.
    async fn drain(&self, stop: CancellationToken) {
        stop.cancelled().await;
        tracing::info!("draining");
        self.draining.send_replace(true);
        let mut status = self.status.clone();
        let drained = async {
            tokio::select! {
                _ = status.wait_for(Option::is_none) => tracing::info!("drained"),
                () = self.stop_without_coordinator() => tracing::info!("training stopped, no coordinator"),
            }
        };
        if timeout(self.drain_timeout, drained).await.is_err() {
            tracing::warn!(after = ?self.drain_timeout, "drain timed out, shutting down");
        }
    }

    /// Stops training while no coordinator is connected. Returns once the engine is idle, because
    /// without a coordinator nothing releases the job.
    async fn stop_without_coordinator(&self) {
        let (mut connected, mut status) = (self.connected.clone(), self.status.clone());
        loop {
            // The senders of these channels live as long as the worker.
            let _ = connected.wait_for(|connected| !connected).await;
            self.desired.send_if_modified(DesiredState::stop_training);
            tokio::select! {
                _ = status.wait_for(|job| job.as_ref().is_none_or(|job| !job.is_busy())) => return,
                _ = connected.wait_for(|connected| *connected) => {}
            }
        }
    }

    /// Stops training when the coordinator has been away for the orphan timeout. Never returns.
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
