//! Faults of workers. A fault belongs to a job, a worker or the store, and each kind has its own
//! type: a fault of a job ([`v1::Failure`]) ends the job, a fault of a worker ([`WorkerFault`])
//! leaves this worker out of the next group, unless no other worker can take its place or another
//! one has reported the same; and a fault of the store
//! ([`StoreError`](crate::store::StoreError)) changes nothing: the action is tried again.

use lora_proto::v1::{self, Fault, Phase};

/// Why a member is left out of the next group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WorkerFault {
    pub(crate) worker: String,
    pub(crate) rank: usize,
    /// The cause, as text for users.
    pub(crate) cause: String,
    /// The process that the job does not use again; `None` if it may return.
    pub(crate) excluded: Option<Exclusion>,
}

/// A process that a job does not use again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exclusion {
    pub(crate) instance_id: String,
    pub(crate) worker: String,
    /// What the process reported to be at fault; `Unspecified` if it could not reach its peers.
    pub(crate) fault: Fault,
}

/// What a member reports to be at fault for a failure that another worker may not have; `None` if
/// it has not failed, or if the job is at fault.
pub(crate) fn local_fault(held: &v1::HeldJob) -> Option<Fault> {
    let is_local = |fault: &Fault| !matches!(fault, Fault::Unspecified | Fault::Job);
    Some(held.fault()).filter(is_local).filter(|_| held.phase() == Phase::Failed)
}

impl WorkerFault {
    /// The event that tells users about the lost worker.
    pub(crate) fn event(&self) -> v1::WorkerLost {
        let Self { worker, rank, cause, .. } = self.clone();
        v1::WorkerLost { worker, rank: rank as u32, cause }
    }
}
