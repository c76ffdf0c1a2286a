//! The gRPC services. A call becomes a command to the service task, or a read of the store.

mod artifacts;
mod fine_tuning;
mod worker_control;

use tokio::sync::{mpsc, oneshot};

pub(crate) use artifacts::Artifacts;
pub(crate) use fine_tuning::FineTuning;
pub(crate) use worker_control::WorkerControl;

use crate::refusal::Refusal;
use crate::service::command::{Command, Reply};

/// The sending end of the service's command queue.
#[derive(Debug, Clone)]
pub(crate) struct Commands(mpsc::Sender<Command>);

impl Commands {
    pub(crate) fn new(sender: mpsc::Sender<Command>) -> Self {
        Self(sender)
    }

    /// Sends a command and waits for its answer.
    pub(crate) async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| Refusal::ShuttingDown)?
    }

    /// Sends a command that has no answer.
    pub(crate) async fn send(&self, command: Command) -> Result<(), Refusal> {
        self.0.send(command).await.map_err(|_| Refusal::ShuttingDown)
    }

    /// Returns once the service has ended.
    pub(crate) async fn closed(&self) {
        self.0.closed().await;
    }
}
