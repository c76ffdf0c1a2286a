//! The gRPC side: checks what comes in, turns it into commands for the service, and streams files and events.

mod artifacts;
mod fine_tuning;
mod worker_control;

use tokio::sync::{mpsc, oneshot};

use crate::command::{Command, Reply};
use crate::refusal::Refusal;

pub(crate) use artifacts::Artifacts;
pub(crate) use fine_tuning::FineTuning;
pub(crate) use worker_control::WorkerControl;

/// The way to the service.
#[derive(Debug, Clone)]
pub(crate) struct Commands(mpsc::Sender<Command>);

impl Commands {
    pub(crate) fn new(sender: mpsc::Sender<Command>) -> Self {
        Self(sender)
    }

    /// Sends a command; waits while the service has too many.
    async fn send(&self, command: Command) -> Result<(), Refusal> {
        self.0.send(command).await.map_err(|_| Refusal::ShuttingDown)
    }

    /// Returns once the service has ended.
    async fn closed(&self) {
        self.0.closed().await;
    }

    /// Sends a command and waits for its answer.
    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| Refusal::ShuttingDown)?
    }
}
