//! What can go wrong in a group, and who is to blame.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::handshake::HandshakeRefusal;

/// Why a group could not be formed, or why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// The caller passed something that no group could work with.
    #[error("invalid argument: {0}")]
    Argument(String),
    /// The operating system failed this rank, not a peer.
    #[error("a socket of this rank failed: {0}")]
    Socket(#[source] io::Error),
    /// No connection to a lower rank came about in time.
    #[error("no connection to rank {rank} at {address} within {timeout:?}: {reason}")]
    NoConnection {
        /// The rank that was called.
        rank: usize,
        /// Where it was called.
        address: String,
        /// How long it was tried.
        timeout: Duration,
        /// How the last attempt ended.
        reason: String,
    },
    /// A lower rank refused this one for good.
    #[error("rank {rank} at {address} refused the connection: {refusal}")]
    Refused {
        /// The rank that was called.
        rank: usize,
        /// Where it was called.
        address: String,
        /// Its reason.
        refusal: HandshakeRefusal,
    },
    /// Higher ranks did not connect in time.
    #[error("ranks {ranks:?} did not connect within {timeout:?}")]
    Missing {
        /// The ranks that did not come.
        ranks: Vec<usize>,
        /// How long they were waited for.
        timeout: Duration,
    },
    /// A member of the same job already forms a newer generation.
    #[error("generation {generation} was given up: a peer already forms generation {newer}")]
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
        /// What was being done.
        operation: Operation,
        /// The number of the operation in this group, from 0.
        sequence: u64,
        /// What the rank did.
        failure: PeerFailure,
    },
    /// A rank demands NCCL where it cannot be used: who, and why not.
    #[error("{0}")]
    NoNccl(String),
    /// NCCL or CUDA failed this rank, and no peer is known to be at fault.
    #[error("{action} over NCCL: {message}")]
    Device {
        /// What was being done.
        action: &'static str,
        /// What NCCL or CUDA says.
        message: String,
    },
    /// Work between the devices was not done in time, though every rank answers.
    #[error("{action} over NCCL was not done within {timeout:?}, though every rank answers")]
    DeviceTimeout {
        /// What was being done.
        action: &'static str,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// An earlier operation of this group failed.
    #[error("the group failed in an earlier operation and must be formed anew")]
    Poisoned,
    /// Given up with a [`CancelToken`](crate::Cancel).
    #[error("cancelled")]
    Cancelled,
}

impl CollectiveError {
    /// The ranks this error holds to be at fault; empty where no peer is.
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
            | Self::Device { .. }
            | Self::DeviceTimeout { .. }
            | Self::Poisoned
            | Self::Cancelled => Vec::new(),
        }
    }

    /// The ranks with which no connection came about when the group was formed.
    pub fn unreachable(&self) -> Vec<usize> {
        match self {
            Self::NoConnection { .. } | Self::Refused { .. } | Self::Missing { .. } => self.suspects(),
            _ => Vec::new(),
        }
    }
}

/// What a rank did to fail an operation. Reads as the end of a sentence that begins with the rank.
#[derive(Debug, thiserror::Error)]
pub enum PeerFailure {
    /// End of stream where a frame was due.
    #[error("closed the connection")]
    Closed,
    /// Not one byte was sent or taken for this long.
    #[error("made no progress for {0:?}")]
    TimedOut(Duration),
    /// The connection broke.
    #[error("lost its connection: {0}")]
    Io(#[source] io::Error),
    /// The rank is in another operation than this one.
    #[error("is at {operation} (call {sequence})")]
    Mismatch {
        /// The operation the rank is in.
        operation: Operation,
        /// Its number.
        sequence: u64,
    },
    /// The rank called the same operation with arguments that do not fit.
    #[error("called it with another number of leaves, other ranges or another vector length")]
    Arguments,
    /// The rank gave the group up of its own accord.
    #[error("left the group")]
    Left,
    /// The rank sent something no rank should.
    #[error("sent a malformed frame: {0}")]
    Malformed(&'static str),
    /// Another rank saw it fail.
    #[error("failed, as rank {by} reports")]
    Reported {
        /// The rank that saw it.
        by: usize,
    },
}

/// The kinds of operation; the number is the kind byte of a frame.
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
    /// Work between the devices, watched with [`crate::Group::check`]; no frame is of this kind.
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
