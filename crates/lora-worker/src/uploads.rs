//! Uploads of a job's files to the coordinator. While the coordinator cannot be reached, the files
//! wait.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use backon::{BackoffBuilder, Retryable};
use lora_proto::file_transfer::{TransferError, upload};
use lora_proto::v1::job_artifact::Name;
use lora_proto::{DigestBuilder, v1};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;
use tonic::transport::Channel;

use crate::backoff::backoff;

/// Uploads files for one generation of a job.
#[derive(Clone)]
pub(crate) struct Uploads {
    pub(crate) channel: Channel,
    pub(crate) job_id: String,
    pub(crate) generation: u64,
}

impl Uploads {
    /// Uploads a file. Retries transient errors without a limit of attempts. Retries too if the
    /// coordinator has a newer generation: the directive with that generation is on its way and
    /// ends the upload.
    ///
    /// # Errors
    /// The coordinator refuses the file.
    pub(crate) async fn upload(&self, name: Name, bytes: &[u8]) -> Result<(), TransferError> {
        let digest = DigestBuilder::of_bytes(bytes);
        (|| self.attempt(&name, &digest, bytes))
            .retry(backoff())
            .when(|error| is_retryable(error) || is_superseded(error))
            .notify(|error, pause| {
                let file = artifact_name(&name);
                tracing::warn!(job = self.job_id, file, %error, ?pause, "upload failed, will retry");
            })
            .await
    }

    async fn attempt(&self, name: &Name, digest: &v1::FileDigest, bytes: &[u8]) -> Result<(), TransferError> {
        let (job_id, generation) = (self.job_id.clone(), self.generation);
        let artifact = v1::JobArtifact { job_id, generation, name: Some(name.clone()) };
        let header = v1::UploadHeader { digest: Some(digest.clone()), artifact: Some(artifact) };
        upload(self.channel.clone(), header, bytes, Path::new(&artifact_name(name)), |_| {}).await
    }
}

/// Whether a later attempt may succeed. Includes internal errors of the coordinator, which the file
/// does not cause.
fn is_retryable(error: &TransferError) -> bool {
    error.is_transient() || code(error) == Some(Code::Internal)
}

fn is_superseded(error: &TransferError) -> bool {
    code(error) == Some(Code::FailedPrecondition)
}

fn code(error: &TransferError) -> Option<Code> {
    match error {
        TransferError::Refused(status) => Some(status.code()),
        _ => None,
    }
}

/// The name of the file in messages.
pub(crate) fn artifact_name(name: &Name) -> String {
    match name {
        Name::CheckpointStep(step) => format!("checkpoint of step {step}"),
        Name::ResultFile(file) => file.clone(),
    }
}

/// Uploads checkpoints while training continues. At most one checkpoint waits, the newest.
pub(crate) struct CheckpointUploader {
    shared: Arc<UploadQueue>,
    task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct UploadQueue {
    waiting: Mutex<Option<PendingCheckpoint>>,
    arrived: Notify,
    problem: Mutex<Option<String>>,
}

struct PendingCheckpoint {
    step: u64,
    digest: v1::FileDigest,
    bytes: Vec<u8>,
}

impl CheckpointUploader {
    /// Starts the task. Dropping the uploader aborts it.
    pub(crate) fn start(runtime: &Handle, uploads: Uploads) -> Self {
        let shared = Arc::new(UploadQueue::default());
        let task = runtime.spawn(Arc::clone(&shared).work(uploads));
        Self { shared, task: AbortOnDropHandle::new(task) }
    }

    /// Drops the waiting checkpoint, because a newer one is about to be made.
    pub(crate) fn drop_pending(&self) {
        *lock(&self.shared.waiting) = None;
    }

    /// Queues the checkpoint after `step` steps, in place of one that still waits.
    pub(crate) fn submit(&self, step: u64, bytes: Vec<u8>) {
        let digest = DigestBuilder::of_bytes(&bytes);
        *lock(&self.shared.waiting) = Some(PendingCheckpoint { step, digest, bytes });
        self.shared.arrived.notify_one();
    }

    /// Returns the last error since the previous call.
    pub(crate) fn take_error(&self) -> Option<String> {
        lock(&self.shared.problem).take()
    }

    /// Ends the task. Its memory is free when this returns.
    pub(crate) async fn end(self) {
        self.task.abort();
        // The result is that the task was cancelled, or a panic, which has been printed.
        let _ = self.task.await;
    }
}

impl UploadQueue {
    async fn work(self: Arc<Self>, uploads: Uploads) {
        let mut pauses = backoff().build();
        let mut current = None;
        loop {
            let newest = lock(&self.waiting).take();
            let Some(checkpoint) = newest.or(current.take()) else {
                self.arrived.notified().await;
                continue;
            };
            let name = Name::CheckpointStep(checkpoint.step);
            match uploads.attempt(&name, &checkpoint.digest, &checkpoint.bytes).await {
                Ok(()) => pauses = backoff().build(),
                Err(error) if is_retryable(&error) => {
                    current = Some(checkpoint);
                    tokio::time::sleep(pauses.next().unwrap_or_default()).await;
                }
                Err(error) if is_superseded(&error) => return,
                Err(error) => *lock(&self.problem) = Some(format!("{}: {error}", artifact_name(&name))),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
