//! The commands that the gRPC handlers send to the service.

use lora_proto::v1;
use lora_spec::DeviceMemory;
use tokio::sync::oneshot;

use crate::control::request::Request;
use crate::control::workers::{Outbox, SessionId};
use crate::refusal::Refusal;

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
    /// The memory that jobs may use on each available worker; empty while they are not known.
    Memory {
        reply: Reply<Vec<DeviceMemory>>,
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
