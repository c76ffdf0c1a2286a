//! What the gRPC side asks of the service.

use lora_proto::v1;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::refusal::Refusal;

/// Messages to a worker that may wait to be sent; a worker that lets more pile up loses its connection.
pub(crate) const OUTBOX_CAPACITY: usize = 64;

/// Where messages to a worker are put.
pub(crate) type Outbox = mpsc::Sender<Result<v1::CoordinatorMessage, Status>>;

/// Names one connection of a worker.
pub(crate) type SessionId = u64;

/// Where the answer to a command goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// One thing for the service to do.
pub(crate) enum Command {
    /// Accept a job; answers its id.
    Submit {
        request: Box<v1::SubmitJobRequest>,
        reply: Reply<String>,
    },
    Cancel {
        job_id: String,
        reply: Reply<()>,
    },
    Pause {
        job_id: String,
        reply: Reply<()>,
    },
    Resume {
        job_id: String,
        workers: Option<v1::WorkersSpec>,
        reply: Reply<()>,
    },
    Workers {
        reply: Reply<Vec<v1::Worker>>,
    },
    Hello {
        hello: Box<v1::Hello>,
        outbox: Outbox,
        reply: Reply<SessionId>,
    },
    Status {
        session: SessionId,
        status: Box<v1::WorkerStatus>,
    },
    Steps {
        session: SessionId,
        steps: v1::Steps,
    },
    WorkerGone {
        session: SessionId,
        cause: String,
    },
}
