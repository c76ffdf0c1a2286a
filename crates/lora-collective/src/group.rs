//! The group and its operations.

use crate::cancel::CancelToken;
use crate::error::{CollectiveError, Operation, PeerFailure};
use crate::link::{Call, CallFailure};
use crate::mesh::Mesh;

/// The largest payload of one rank in [`Group::all_gather`].
pub const MAX_GATHER_BYTES: usize = 1 << 20;

/// The largest message of [`Group::broadcast`].
pub const MAX_BROADCAST_BYTES: u64 = 1 << 36;

/// Payload of a broadcast's frames.
const BROADCAST_FRAME_BYTES: usize = 1 << 20;

/// The ranks of one job in one generation, connected with each other.
///
/// Every rank must call the same operations in the same order; a rank that does otherwise is an error at the others.
/// A wait without progress ends after the group's timeout; where the peer waited for may itself be waiting for a third
/// rank, after 1.25 times the timeout. After an error every further call fails with [`CollectiveError::Poisoned`], and
/// the peers, which have been told, fail as well; so it is after an operation that was cancelled. Dropping the group closes
/// its connections.
pub struct Group {
    pub(crate) mesh: Mesh,
    cancel: CancelToken,
    sequence: u64,
    poisoned: bool,
    /// Memory of the all-reduce, kept from call to call.
    pub(crate) vectors: Vec<f32>,
}

impl Group {
    /// The group of one rank: no connections, and operations that only do this rank's part.
    pub fn single() -> Self {
        Self::new(Mesh::new(0, Vec::new(), std::time::Duration::ZERO), CancelToken::new())
    }

    pub(crate) fn new(mesh: Mesh, cancel: CancelToken) -> Self {
        Self { mesh, cancel, sequence: 0, poisoned: false, vectors: Vec::new() }
    }

    /// The token that the group was formed with.
    pub fn cancel_token(&self) -> &CancelToken {
        &self.cancel
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.mesh.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.mesh.world_size()
    }

    /// Payload bytes sent to all peers since the group was formed.
    pub fn bytes_sent(&self) -> u64 {
        self.mesh.links.iter().map(|link| link.sent()).sum()
    }

    /// Payload bytes received from all peers since the group was formed.
    pub fn bytes_received(&self) -> u64 {
        self.mesh.links.iter().map(|link| link.received()).sum()
    }

    /// Every rank's `payload`, by rank: for small messages of at most [`MAX_GATHER_BYTES`].
    ///
    /// # Errors
    /// A failed peer, or a payload that is too large.
    pub fn all_gather(&mut self, payload: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        if payload.len() > MAX_GATHER_BYTES {
            return Err(self.invalid(
                Operation::AllGather,
                format!("{} bytes to gather, the most is {MAX_GATHER_BYTES}", payload.len()),
            ));
        }
        self.run(Operation::AllGather, |mesh, call| mesh.gather(call, payload, MAX_GATHER_BYTES))
    }

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// A failed peer.
    pub fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.run(Operation::Barrier, |mesh, call| mesh.gather(call, &[], 0).map(drop))
    }

    /// Replaces `data` by that of rank `root`, of at most [`MAX_BROADCAST_BYTES`]. The root returns when its part is
    /// on the way; after an error the others' `data` holds what has arrived.
    ///
    /// # Errors
    /// A failed peer, data that is too large, or a root that is no rank.
    pub fn broadcast(&mut self, root: usize, data: &mut Vec<u8>) -> Result<(), CollectiveError> {
        if root >= self.world_size() {
            let message = format!("root {root} in a group of {} ranks", self.world_size());
            return Err(self.invalid(Operation::Broadcast, message));
        }
        if root == self.rank() && data.len() as u64 > MAX_BROADCAST_BYTES {
            let message = format!("{} bytes to broadcast, the most is {MAX_BROADCAST_BYTES}", data.len());
            return Err(self.invalid(Operation::Broadcast, message));
        }
        self.run(Operation::Broadcast, |mesh, call| match mesh.links.iter().find(|link| link.rank == root) {
            None => send_all(mesh, call, data),
            Some(link) => {
                data.clear();
                let total = link.receive(call, mesh.timeout, 8)?;
                let total = total.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
                let Some(total) = total.filter(|total| *total <= MAX_BROADCAST_BYTES) else {
                    return Err(link.failed(PeerFailure::Malformed("no valid length of a broadcast")));
                };
                // Grows with what has come, not with what was announced.
                while (data.len() as u64) < total {
                    let filled = data.len();
                    let frame = (total - filled as u64).min(BROADCAST_FRAME_BYTES as u64);
                    data.resize(filled + frame as usize, 0);
                    link.receive_into(call, mesh.timeout, &mut data[filled..])?;
                }
                Ok(())
            }
        })
    }

    /// Looks, without sending or waiting, whether the group still stands: for long work beside it, such as that of
    /// devices. What a peer that is ahead has sent stays for the operation that it belongs to.
    ///
    /// # Errors
    /// A peer has closed its connection or hung up, or the group was cancelled. As after any error, the group is of no
    /// further use then.
    pub fn check(&mut self) -> Result<(), CollectiveError> {
        self.check_usable()?;
        let disconnected_peer = match self.mesh.disconnected_peer() {
            Ok(disconnected_peer) => disconnected_peer,
            Err(error) => {
                self.leave();
                return Err(CollectiveError::Socket(error));
            }
        };
        let call = Call::new(Operation::Device, self.sequence, self.cancel.clone());
        let failure = match disconnected_peer {
            _ if self.cancel.is_cancelled() => CallFailure::Aborted,
            Some(link) => link.abort_frame(&call),
            None => return Ok(()),
        };
        self.poisoned = true;
        Err(self.abort_with(&call, failure))
    }

    /// Runs one operation; an error, or a panic, leaves the group poisoned.
    pub(crate) fn run<T>(
        &mut self,
        operation: Operation,
        body: impl FnOnce(&Mesh, &Call) -> Result<T, CallFailure>,
    ) -> Result<T, CollectiveError> {
        let call = self.begin(operation)?;
        let result = if self.cancel.is_cancelled() {
            Err(CallFailure::Aborted)
        } else {
            let _waiting = self.cancel.waiting();
            body(&self.mesh, &call)
        };
        match result {
            Ok(value) => {
                self.poisoned = false;
                Ok(value)
            }
            Err(failure) => Err(self.abort_with(&call, failure)),
        }
    }

    /// Leaves the group: the peers, if they still listen, are told that this rank gave it up.
    pub(crate) fn leave(&mut self) {
        if let Ok(call) = self.begin(Operation::Device) {
            self.mesh.send_abort(&call, self.mesh.rank);
        }
    }

    /// The error for what `rank` sent in an operation that went well as such.
    pub(crate) fn fail_peer(
        &mut self,
        operation: Operation,
        rank: usize,
        failure: PeerFailure,
    ) -> CollectiveError {
        match self.begin(operation) {
            Ok(call) => self.abort_with(&call, CallFailure::Failed { rank, failure }),
            Err(poisoned) => poisoned,
        }
    }

    /// The error for an argument that only this rank knows to be wrong: the peers are already waiting for it.
    pub(crate) fn invalid(&mut self, operation: Operation, message: String) -> CollectiveError {
        match self.begin(operation) {
            Ok(call) => {
                self.mesh.send_abort(&call, self.mesh.rank);
                CollectiveError::Argument(format!("{operation}: {message}"))
            }
            Err(poisoned) => poisoned,
        }
    }

    /// Numbers a call, and poisons the group until the call has succeeded.
    fn begin(&mut self, operation: Operation) -> Result<Call, CollectiveError> {
        self.check_usable()?;
        self.poisoned = true;
        self.sequence += 1;
        Ok(Call::new(operation, self.sequence - 1, self.cancel.clone()))
    }

    /// An error once an earlier operation failed.
    pub(crate) fn check_usable(&self) -> Result<(), CollectiveError> {
        match self.poisoned {
            false => Ok(()),
            true if self.cancel.is_cancelled() => Err(CollectiveError::Cancelled),
            true => Err(CollectiveError::Poisoned),
        }
    }

    /// Hangs up after `call` was stopped, and says why.
    fn abort_with(&self, call: &Call, failure: CallFailure) -> CollectiveError {
        let (failed_rank, error) = match failure {
            _ if self.cancel.is_cancelled() => (self.mesh.rank, CollectiveError::Cancelled),
            CallFailure::Failed { rank, failure } => {
                let Call { operation, sequence, .. } = *call;
                (rank, CollectiveError::Peer { rank, operation, sequence, failure })
            }
            CallFailure::Aborted => (self.mesh.rank, CollectiveError::Poisoned),
        };
        self.mesh.send_abort(call, failed_rank);
        error
    }
}

fn send_all(mesh: &Mesh, call: &Call, data: &[u8]) -> Result<(), CallFailure> {
    let total = (data.len() as u64).to_le_bytes();
    mesh.exchange(
        call,
        |link| {
            link.send(call, mesh.timeout, &[&total])?;
            data.chunks(BROADCAST_FRAME_BYTES).try_for_each(|frame| link.send(call, mesh.timeout, &[frame]))
        },
        || Ok(()),
    )
}
