//! The commands that the gRPC handlers send to the service.

use lora_proto::v1;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::request::Request;
use crate::rpc::refusal::Refusal;

/// The capacity of the queue of messages to one worker; if the queue overflows, the worker's
/// connection is closed.
pub(crate) const OUTBOX_CAPACITY: usize = 64;

/// The queue of messages to one worker.
pub(crate) type Outbox = mpsc::Sender<Result<v1::CoordinatorMessage, Status>>;

/// The number of one connection of a worker.
pub(crate) type SessionId = u64;

/// The channel for the answer to a command.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// A command to the service.
pub(crate) enum Command {
    /// Accepts a job; the answer is its id.
    Submit {
        request: Box<v1::SubmitJobRequest>,
        reply: Reply<String>,
    },
    /// Cancels or pauses a job.
    Request {
        job_id: String,
        request: Request,
        reply: Reply<()>,
    },
    /// Resumes a job, with another number of workers if one is given.
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
