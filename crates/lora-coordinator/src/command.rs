//! What the gRPC side asks of the service.

use std::path::PathBuf;

use futures_util::stream::BoxStream;
use lora_proto::v1;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::refusal::Refusal;

/// Messages to a worker that may wait to be sent; a worker that lets more pile up is given up.
pub(crate) const OUTBOX_MESSAGES: usize = 32;

/// Where a worker's messages are put.
pub(crate) type Outbox = mpsc::Sender<Result<v1::CoordinatorMessage, Status>>;

/// Names one connection of a worker.
pub(crate) type SessionId = u64;

/// A job's events as they are sent to a watcher.
pub(crate) type EventStream = BoxStream<'static, Result<v1::JobEvent, Status>>;

/// Where the answer to a command goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// One thing for the service to do.
pub(crate) enum Command {
    Submit {
        request: Box<v1::SubmitJobRequest>,
        reply: Reply<String>,
    },
    Get {
        job_id: String,
        reply: Reply<v1::Job>,
    },
    Watch {
        job_id: String,
        from: u64,
        reply: Reply<EventStream>,
    },
    Pause {
        job_id: String,
        reply: Reply<v1::Job>,
    },
    Hello {
        hello: v1::Hello,
        outbox: Outbox,
        reply: Reply<SessionId>,
    },
    Report {
        session: SessionId,
        report: v1::JobReport,
    },
    WorkerGone {
        session: SessionId,
        cause: String,
    },
    /// Where to write an upload.
    StageUpload {
        upload: Upload,
        reply: Reply<PathBuf>,
    },
    /// The upload lies whole at the path.
    CommitUpload {
        upload: Upload,
        path: PathBuf,
        reply: Reply<()>,
    },
    /// Where an artifact lies.
    Locate {
        job_id: String,
        name: ArtifactName,
        reply: Reply<PathBuf>,
    },
    Shutdown,
}

/// A file on its way into a job's output directory.
#[derive(Debug, Clone)]
pub(crate) struct Upload {
    pub(crate) job_id: String,
    pub(crate) generation: u64,
    pub(crate) name: ArtifactName,
}

/// A file of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ArtifactName {
    Checkpoint {
        step: u64,
    },
    /// A bare file name: letters, digits, `-`, `_` and `.`, not starting with a dot.
    Result {
        file: String,
    },
}
