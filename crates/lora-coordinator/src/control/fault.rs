//! Faults of workers. A fault belongs to a job, a worker or the store, and each kind has its own
//! type: a fault of a job ([`v1::Failure`]) ends the job, a fault of a worker ([`WorkerFault`])
//! leaves this worker out of the next group, and a fault of the store
//! ([`StoreError`](crate::store::StoreError)) changes nothing: the action is tried again.

use lora_proto::v1;

/// Why a member is left out of the next group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WorkerFault {
    pub(crate) worker: String,
    pub(crate) rank: usize,
    /// The cause, as text for users.
    pub(crate) cause: String,
    /// The process that the job does not use again; `None` if it may return.
    pub(crate) excluded: Option<String>,
}

impl WorkerFault {
    /// The event that tells users about the lost worker.
    pub(crate) fn event(&self) -> v1::WorkerLost {
        let Self { worker, rank, cause, .. } = self.clone();
        v1::WorkerLost { worker, rank: rank as u32, cause }
    }
}
