//! Files of a job on their way to the coordinator. While it is away they wait.

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

/// Where the files of a job's group go.
#[derive(Clone)]
pub(crate) struct Uploads {
    pub(crate) channel: Channel,
    pub(crate) job_id: String,
    pub(crate) generation: u64,
}

impl Uploads {
    /// Uploads a file; tried again for as long as it may work later. That is also so where the coordinator knows a newer
    /// generation: the directive that says so is on its way and ends this.
    ///
    /// # Errors
    /// The coordinator refuses the file.
    pub(crate) async fn upload(&self, name: Name, bytes: &[u8]) -> Result<(), TransferError> {
        let digest = DigestBuilder::of_bytes(bytes);
        (|| self.attempt(&name, &digest, bytes))
            .retry(backoff())
            .when(|error| is_retryable(error) || is_superseded(error))
            .notify(|error, pause| {
                tracing::warn!(job = self.job_id, file = artifact_name(&name), %error, ?pause, "upload failed, trying again");
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

/// An error inside the coordinator is not the file's fault either.
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

/// What people call the file.
pub(crate) fn artifact_name(name: &Name) -> String {
    match name {
        Name::CheckpointStep(step) => format!("checkpoint of step {step}"),
        Name::ResultFile(file) => file.clone(),
    }
}

/// Uploads checkpoints beside the training. At most one waits, the newest.
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
    /// Starts the task, which ends with this.
    pub(crate) fn start(runtime: &Handle, uploads: Uploads) -> Self {
        let shared = Arc::new(UploadQueue::default());
        let task = runtime.spawn(Arc::clone(&shared).work(uploads));
        Self { shared, task: AbortOnDropHandle::new(task) }
    }

    /// Lets go of the one that waits: a newer one is about to be made.
    pub(crate) fn drop_pending(&self) {
        *lock(&self.shared.waiting) = None;
    }

    /// Takes the state after `step` steps, in the place of one that still waits.
    pub(crate) fn submit(&self, step: u64, bytes: Vec<u8>) {
        let digest = DigestBuilder::of_bytes(&bytes);
        *lock(&self.shared.waiting) = Some(PendingCheckpoint { step, digest, bytes });
        self.shared.arrived.notify_one();
    }

    /// What went wrong since the last look.
    pub(crate) fn take_error(&self) -> Option<String> {
        lock(&self.shared.problem).take()
    }

    /// Ends the task. When this returns, its memory is free.
    pub(crate) async fn end(self) {
        self.task.abort();
        // It was cancelled; a panic has been printed.
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
