//! The all-reduce between devices, as a sequence of grouped exchanges, copies and ordered additions on whatever moves
//! bytes between them. This module does not use CUDA.
//!
//! It is the all-reduce of [`Group::all_reduce_tree`](crate::Group::all_reduce_tree) with the same slices, the same
//! order of additions and so the same bits, but without frames: a slice of a node goes as one part.

use std::ops::Range;

use crate::error::CollectiveError;
use crate::reduction_plan::ReductionPlan;
use crate::tree::NodeId;

const ELEMENT_BYTES: u64 = size_of::<f32>() as u64;

/// Memory of a device that goes to, or comes from, a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerBuffer {
    /// The other rank.
    pub peer: usize,
    /// The first byte.
    pub address: u64,
    /// Elements of f32, never 0.
    pub elements: usize,
}

/// What moves and adds memory of a rank's device: f32 elements at addresses in bytes. Operations take effect in the
/// order they were called in.
pub trait Transport {
    /// Why an operation could not be asked for.
    type Error;

    /// Sends and receives all at once: no part waits for another. Several parts for the same peer arrive in order.
    ///
    /// # Errors
    /// Those of the fabric.
    fn exchange(&mut self, sends: &[PeerBuffer], receives: &[PeerBuffer]) -> Result<(), Self::Error>;

    /// Copies `elements`.
    ///
    /// # Errors
    /// Those of the fabric.
    fn copy(&mut self, from: u64, to: u64, elements: usize) -> Result<(), Self::Error>;

    /// Carries out `order` on the vectors of `elements` elements that lie one after the other at `vectors`, as
    /// [`tree::combine`](crate::tree::combine) does.
    ///
    /// # Errors
    /// Those of the fabric.
    fn combine(&mut self, order: &[(usize, usize)], vectors: u64, elements: usize)
    -> Result<(), Self::Error>;
}

/// One rank's part in the all-reduce of a segment: a range of a vector, the same on all ranks.
pub struct SegmentPlan {
    plan: ReductionPlan,
    rank: usize,
}

impl SegmentPlan {
    /// The part of `rank` where the ranks own `ranges` of `leaves` leaves and a segment has `elements` elements.
    ///
    /// # Errors
    /// [`CollectiveError::Argument`] for ranges that are not a partition of the leaves, or a rank that has none.
    pub fn new(
        leaves: usize,
        ranges: &[Range<usize>],
        rank: usize,
        elements: usize,
    ) -> Result<Self, CollectiveError> {
        if rank >= ranges.len() {
            return Err(CollectiveError::Argument(format!("rank {rank} with {} ranges", ranges.len())));
        }
        let plan =
            ReductionPlan::new(leaves, ranges, ranges.len(), elements).map_err(CollectiveError::Argument)?;
        Ok(Self { plan, rank })
    }

    /// Elements of device memory that [`Self::all_reduce`] needs beside the vectors.
    pub fn scratch_elements(&self) -> usize {
        self.plan.nodes.len() * self.mine().len()
    }

    /// Sums the segment over all leaves into that of `out` on every rank.
    ///
    /// `nodes` are this rank's, each with the address of the segment in its vector; `out` may be one of them. `scratch`
    /// is the address of [`Self::scratch_elements`] elements.
    ///
    /// # Errors
    /// [`CollectiveError::Argument`] where the nodes are not those of this rank's range, and those of the fabric.
    pub fn all_reduce<F: Transport<Error: From<CollectiveError>>>(
        &self,
        transport: &mut F,
        nodes: &[(NodeId, u64)],
        scratch: u64,
        out: u64,
    ) -> Result<(), F::Error> {
        let checked = self.plan.check(self.rank, nodes.iter().map(|(id, _)| id));
        checked.map_err(CollectiveError::Argument)?;
        self.reduce(transport, nodes, scratch, out)?;
        self.gather(transport, out)
    }

    /// Sends the nodes' slices to their owners and adds up this rank's slice of all nodes.
    fn reduce<F: Transport>(
        &self,
        transport: &mut F,
        nodes: &[(NodeId, u64)],
        scratch: u64,
        out: u64,
    ) -> Result<(), F::Error> {
        let mine = self.mine();
        let len = mine.len();
        let place = |node: usize| element_address(scratch, node * len);
        let sends = self.peers().flat_map(|peer| {
            let slice = self.plan.slice(peer);
            nodes
                .iter()
                .map(move |(_, node)| peer_buffer(peer, element_address(*node, slice.start), slice.len()))
        });
        let receives = self.peers().flat_map(|peer| {
            self.plan.owned[peer].clone().map(move |node| peer_buffer(peer, place(node), len))
        });
        exchange(transport, sends, receives)?;
        if mine.is_empty() {
            return Ok(());
        }
        for (node, (_, vector)) in self.plan.owned[self.rank].clone().zip(nodes) {
            transport.copy(element_address(*vector, mine.start), place(node), len)?;
        }
        if !self.plan.order.is_empty() {
            transport.combine(&self.plan.order, scratch, len)?;
        }
        transport.copy(scratch, element_address(out, mine.start), len)
    }

    /// Sends this rank's slice of `out` to all and receives the others'.
    fn gather<F: Transport>(&self, transport: &mut F, out: u64) -> Result<(), F::Error> {
        let whole = |peer, rank| {
            let slice = self.plan.slice(rank);
            peer_buffer(peer, element_address(out, slice.start), slice.len())
        };
        let sends = self.peers().map(|peer| whole(peer, self.rank));
        let receives = self.peers().map(|peer| whole(peer, peer));
        exchange(transport, sends, receives)
    }

    fn mine(&self) -> Range<usize> {
        self.plan.slice(self.rank)
    }

    /// The other ranks, from the next one around.
    fn peers(&self) -> impl Iterator<Item = usize> {
        let (rank, world_size) = (self.rank, self.plan.owned.len());
        (1..world_size).map(move |distance| (rank + distance) % world_size)
    }
}

/// One grouped call of all parts that are not empty, unless all are.
fn exchange<F: Transport>(
    transport: &mut F,
    sends: impl Iterator<Item = PeerBuffer>,
    receives: impl Iterator<Item = PeerBuffer>,
) -> Result<(), F::Error> {
    let filled = |part: &PeerBuffer| part.elements > 0;
    let (sends, receives): (Vec<_>, Vec<_>) =
        (sends.filter(filled).collect(), receives.filter(filled).collect());
    match sends.is_empty() && receives.is_empty() {
        true => Ok(()),
        false => transport.exchange(&sends, &receives),
    }
}

fn peer_buffer(peer: usize, address: u64, elements: usize) -> PeerBuffer {
    PeerBuffer { peer, address, elements }
}

/// The address of an element.
fn element_address(vector: u64, element: usize) -> u64 {
    vector + element as u64 * ELEMENT_BYTES
}
