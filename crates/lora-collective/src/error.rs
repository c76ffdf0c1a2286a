//! The errors of a group, with the ranks at fault.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::refusal::HandshakeRefusal;

/// The reason why a group could not be formed or an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// The caller passed an invalid argument.
    #[error("invalid argument: {0}")]
    Argument(String),
    /// A socket operation failed on this rank. No peer is at fault.
    #[error("a socket of this rank failed: {0}")]
    Socket(#[source] io::Error),
    /// This rank could not connect to a lower rank in time.
    #[error("no connection to rank {rank} at {address} within {timeout:?}: {reason}")]
    NoConnection {
        /// The rank that was called.
        rank: usize,
        /// The address of that rank.
        address: String,
        /// The time limit.
        timeout: Duration,
        /// The error of the last attempt.
        reason: String,
    },
    /// A lower rank refused this rank permanently.
    #[error("rank {rank} at {address} refused the connection: {refusal}")]
    Refused {
        /// The rank that was called.
        rank: usize,
        /// The address of that rank.
        address: String,
        /// The reason of the refusal.
        refusal: HandshakeRefusal,
    },
    /// Higher ranks did not connect in time.
    #[error("ranks {ranks:?} did not connect within {timeout:?}")]
    Missing {
        /// The ranks that did not connect.
        ranks: Vec<usize>,
        /// The time limit.
        timeout: Duration,
    },
    /// A member of the same job already forms a newer generation.
    #[error("generation {generation} is outdated: a peer already forms generation {newer}")]
    Superseded {
        /// The generation of this group.
        generation: u64,
        /// The generation of the peer.
        newer: u64,
    },
    /// A peer failed during an operation.
    #[error("{operation} (call {sequence}): rank {rank} {failure}")]
    Peer {
        /// The rank at fault.
        rank: usize,
        /// The operation that failed.
        operation: Operation,
        /// The number of the operation in this group, from 0.
        sequence: u64,
        /// The kind of failure.
        failure: PeerFailure,
    },
    /// A rank requires NCCL, which cannot be used. The text has the rank, the reason and the
    /// remedy.
    #[error("{0}")]
    NoNccl(String),
    /// This rank requires NCCL, but the build has no CUDA.
    #[error("invalid argument: collective nccl: this build has no CUDA; use auto or tcp")]
    BuiltWithoutCuda,
    /// NCCL or CUDA reported an error on this rank, and no peer is known to be at fault.
    #[error("{action} over NCCL: {message}")]
    Device {
        /// The action that failed.
        action: &'static str,
        /// The message of NCCL or CUDA.
        message: String,
    },
    /// Work between the devices did not finish in time, although every rank answers.
    #[error("{action} over NCCL did not finish within {timeout:?}, although every rank answers")]
    DeviceTimeout {
        /// The action that did not finish.
        action: &'static str,
        /// The time limit.
        timeout: Duration,
    },
    /// An earlier operation of this group failed.
    #[error("the group failed in an earlier operation; a new group must be formed")]
    Poisoned,
    /// Cancelled with a [`CancelToken`](crate::CancelToken).
    #[error("cancelled")]
    Cancelled,
}

impl CollectiveError {
    /// The ranks at fault according to this error; empty if no peer is at fault.
    pub fn suspects(&self) -> Vec<usize> {
        match self {
            Self::NoConnection { rank, .. } | Self::Refused { rank, .. } | Self::Peer { rank, .. } => {
                vec![*rank]
            }
            Self::Missing { ranks, .. } => ranks.clone(),
            Self::Argument(_)
            | Self::Socket(_)
            | Self::Superseded { .. }
            | Self::NoNccl(_)
            | Self::BuiltWithoutCuda
            | Self::Device { .. }
            | Self::DeviceTimeout { .. }
            | Self::Poisoned
            | Self::Cancelled => Vec::new(),
        }
    }

    /// The ranks to which no connection could be made when the group was formed.
    pub fn unreachable(&self) -> Vec<usize> {
        match self {
            Self::NoConnection { .. } | Self::Refused { .. } | Self::Missing { .. } => self.suspects(),
            _ => Vec::new(),
        }
    }
}

/// How a rank failed. The text continues a sentence that begins with `rank N`.
#[derive(Debug, thiserror::Error)]
pub enum PeerFailure {
    /// The stream ended although a frame was expected.
    #[error("closed the connection")]
    Closed,
    /// No byte was sent or received for this long.
    #[error("made no progress for {0:?}")]
    TimedOut(Duration),
    /// The connection failed.
    #[error("lost its connection: {0}")]
    Io(#[source] io::Error),
    /// The rank called another operation.
    #[error("is at {operation} (call {sequence})")]
    Mismatch {
        /// The operation that the rank called.
        operation: Operation,
        /// The number of that operation.
        sequence: u64,
    },
    /// The rank called the same operation with different arguments.
    #[error("called the operation with another number of leaves, other ranges or another vector length")]
    Arguments,
    /// The rank left the group without reporting another rank's failure.
    #[error("left the group")]
    Left,
    /// The rank sent a frame that violates the protocol.
    #[error("sent a malformed frame: {0}")]
    Malformed(&'static str),
    /// Another rank reported its failure.
    #[error("failed, as reported by rank {by}")]
    Reported {
        /// The rank that reported it.
        by: usize,
    },
}

/// The kind of an operation. The number is the kind byte of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// [`crate::Group::all_gather`]
    AllGather = 1,
    /// [`crate::Group::broadcast`]
    Broadcast = 2,
    /// [`crate::Group::all_reduce_tree`]
    AllReduce = 3,
    /// [`crate::Group::barrier`]
    Barrier = 4,
    /// Work between the devices, which [`crate::Group::check`] monitors. No frame has this kind.
    Device = 5,
}

impl Operation {
    pub(crate) fn from_kind(kind: u8) -> Option<Self> {
        [Self::AllGather, Self::Broadcast, Self::AllReduce, Self::Barrier]
            .into_iter()
            .find(|op| *op as u8 == kind)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllGather => "all-gather",
            Self::Broadcast => "broadcast",
            Self::AllReduce => "all-reduce",
            Self::Barrier => "barrier",
            Self::Device => "work between the devices",
        })
    }
}
