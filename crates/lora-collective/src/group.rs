//! The group and its operations.

use std::ops::Range;

use crate::all_reduce::TreeAllReduce;
use crate::cancel::CancelToken;
use crate::error::{CollectiveError, Operation, PeerFailure};
use crate::group_spec::GroupSpec;
use crate::link::{Call, CallFailure};
use crate::mesh::Mesh;
use crate::rendezvous::{PeerListener, form_mesh};
use crate::tree::NodeId;

/// The largest payload of one rank in [`Group::all_gather`], in bytes.
pub const MAX_GATHER_BYTES: usize = 1 << 20;

/// The largest message of [`Group::broadcast`], in bytes.
pub const MAX_BROADCAST_BYTES: u64 = 1 << 36;

/// Payload of a frame of a broadcast, in bytes.
const BROADCAST_FRAME_BYTES: usize = 1 << 20;

/// The ranks of one job in one generation, connected with each other.
///
/// Every rank must call the same operations in the same order. If a rank calls another operation,
/// the other ranks get an error. A wait without progress ends after the group's timeout, or after
/// 1.25 times the timeout if the awaited peer may itself be waiting for a third rank. After an
/// error, or after an operation that was cancelled, every further call fails with
/// [`CollectiveError::Poisoned`] or [`CollectiveError::Cancelled`], and the peers, which get an
/// abort, fail as well. Dropping the group closes its connections.
pub struct Group {
    pub(crate) mesh: Mesh,
    cancel: CancelToken,
    sequence: u64,
    poisoned: bool,
    /// Buffer of the all-reduce, reused by the next call.
    vectors: Vec<f32>,
}

impl Group {
    /// Creates a group of one rank, without connections.
    pub fn single() -> Self {
        Self::new(Mesh::new(0, Vec::new(), std::time::Duration::ZERO), CancelToken::new())
    }

    /// Connects this rank with all other ranks and returns once all ranks are connected. All ranks
    /// except the last one need a listener. A group of one rank opens no connection. `cancel`
    /// cancels the formation, and later the group's operations.
    ///
    /// # Errors
    /// A peer that did not connect or refused the connection within the timeout, a peer that forms
    /// a newer generation of the same job, a cancellation, or an invalid `spec`.
    pub fn form(
        spec: &GroupSpec,
        listener: Option<&PeerListener>,
        cancel: CancelToken,
    ) -> Result<Self, CollectiveError> {
        let mesh = form_mesh(spec, listener, &cancel)?;
        let mut group = Self::new(mesh, cancel);
        group.barrier()?;
        group.mesh.timeout = spec.timeout;
        Ok(group)
    }

    fn new(mesh: Mesh, cancel: CancelToken) -> Self {
        Self { mesh, cancel, sequence: 0, poisoned: false, vectors: Vec::new() }
    }

    /// The cancel token that the group was formed with.
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

    /// Returns every rank's `payload`, by rank. A payload has at most [`MAX_GATHER_BYTES`] bytes.
    ///
    /// # Errors
    /// A failed peer, or a payload that is too large.
    pub fn all_gather(&mut self, payload: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        if payload.len() > MAX_GATHER_BYTES {
            return Err(self.invalid(
                Operation::AllGather,
                format!("{} bytes to gather, the limit is {MAX_GATHER_BYTES}", payload.len()),
            ));
        }
        self.run(Operation::AllGather, |mesh, call| mesh.gather(call, payload, MAX_GATHER_BYTES))
    }

    /// Returns once every rank has called this method.
    ///
    /// # Errors
    /// A failed peer.
    pub fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.run(Operation::Barrier, |mesh, call| mesh.gather(call, &[], 0).map(drop))
    }

    /// Sums one vector per leaf over the `leaves` leaves of all ranks, in the order of the
    /// [tree](crate::tree), into `out` on every rank.
    ///
    /// `ranges` has the leaves that each rank owns, in rank order (see [`crate::tree::partition`]).
    /// `ranges` and the length of `out` must be equal on all ranks. `nodes` are this rank's sums
    /// from [`crate::tree::TreeAccumulator::finish`], each as long as `out`. The bits of the result
    /// depend only on the leaves. After an error the contents of `out` are unspecified.
    ///
    /// # Errors
    /// A failed peer, ranges that are not a partition of the leaves, or nodes that are not the
    /// nodes of this rank's range.
    pub fn all_reduce_tree(
        &mut self,
        leaves: usize,
        ranges: &[Range<usize>],
        nodes: &[(NodeId, &[f32])],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let prepared = TreeAllReduce::new(leaves, ranges, self.world_size(), out.len());
        let all_reduce = match prepared.and_then(|it| it.check(self.rank(), nodes, out.len()).map(|()| it)) {
            Ok(all_reduce) => all_reduce,
            Err(message) => return Err(self.invalid(Operation::AllReduce, message)),
        };
        let mut vectors = std::mem::take(&mut self.vectors);
        let result =
            self.run(Operation::AllReduce, |mesh, call| all_reduce.run(mesh, call, nodes, &mut vectors, out));
        self.vectors = vectors;
        result
    }

    /// Replaces `data` with the data of rank `root`, which has at most [`MAX_BROADCAST_BYTES`]
    /// bytes. The root returns when its data has been handed to the operating system. After an
    /// error the `data` of the other ranks contains what has been received so far.
    ///
    /// # Errors
    /// A failed peer, data that is too large, or a root that is not a rank of the group.
    pub fn broadcast(&mut self, root: usize, data: &mut Vec<u8>) -> Result<(), CollectiveError> {
        if root >= self.world_size() {
            let message = format!("root {root} in a group of {} ranks", self.world_size());
            return Err(self.invalid(Operation::Broadcast, message));
        }
        if root == self.rank() && data.len() as u64 > MAX_BROADCAST_BYTES {
            let message = format!("{} bytes to broadcast, the limit is {MAX_BROADCAST_BYTES}", data.len());
            return Err(self.invalid(Operation::Broadcast, message));
        }
        self.run(Operation::Broadcast, |mesh, call| match mesh.links.iter().find(|link| link.rank == root) {
            None => send_all(mesh, call, data),
            Some(link) => {
                data.clear();
                let total = link.receive(call, mesh.timeout, 8)?;
                let total = total.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
                let Some(total) = total.filter(|total| *total <= MAX_BROADCAST_BYTES) else {
                    return Err(link.failed(PeerFailure::Malformed("invalid length of a broadcast")));
                };
                // The buffer grows with the received data, so that an announced length alone does
                // not allocate memory.
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

    /// Checks, without sending or waiting, that no peer has left and that the group is not
    /// cancelled. It is meant for long work outside of the group's operations, such as work on
    /// devices. Frames that a peer has already sent for a later operation are not consumed.
    ///
    /// # Errors
    /// A peer has closed its connection or its sending side, or the group was cancelled. As after
    /// any error, the group cannot be used any more.
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
            Some(link) => link.drain_to_failure(&call),
            None => return Ok(()),
        };
        self.poisoned = true;
        Err(self.abort_with(&call, failure))
    }

    /// Runs one operation. An error or a panic poisons the group.
    fn run<T>(
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

    /// Leaves the group and sends an abort to the peers, unless the group is poisoned already.
    pub(crate) fn leave(&mut self) {
        if let Ok(call) = self.begin(Operation::Device) {
            self.mesh.send_abort(&call, self.mesh.rank);
        }
    }

    /// Ends the group because `rank` sent invalid data in an operation that succeeded, and returns
    /// the error.
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

    /// Ends the group because of an argument that is invalid on this rank, and returns the error.
    /// The peers get an abort, because they may already be waiting for this rank.
    fn invalid(&mut self, operation: Operation, message: String) -> CollectiveError {
        match self.begin(operation) {
            Ok(call) => {
                self.mesh.send_abort(&call, self.mesh.rank);
                CollectiveError::Argument(format!("{operation}: {message}"))
            }
            Err(poisoned) => poisoned,
        }
    }

    /// Begins the next call and poisons the group until the call has succeeded.
    fn begin(&mut self, operation: Operation) -> Result<Call, CollectiveError> {
        self.check_usable()?;
        self.poisoned = true;
        self.sequence += 1;
        Ok(Call::new(operation, self.sequence - 1, self.cancel.clone()))
    }

    /// Returns an error if an earlier operation failed.
    pub(crate) fn check_usable(&self) -> Result<(), CollectiveError> {
        match self.poisoned {
            false => Ok(()),
            true if self.cancel.is_cancelled() => Err(CollectiveError::Cancelled),
            true => Err(CollectiveError::Poisoned),
        }
    }

    /// Sends an abort to the peers after `call` failed, and returns the error.
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
