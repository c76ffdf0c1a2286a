//! The all-reduce between devices, as a sequence of grouped exchanges, copies and ordered additions
//! on any [`Transport`]. This module does not use CUDA.
//!
//! It has the slices and the order of additions of
//! [`Group::all_reduce_tree`](crate::Group::all_reduce_tree), and therefore the same bits, but it
//! has no frames: a slice of a node is sent as one part.

use std::ops::Range;

use crate::error::CollectiveError;
use crate::reduction_plan::ReductionPlan;
use crate::tree::NodeId;

const ELEMENT_BYTES: u64 = size_of::<f32>() as u64;

/// Memory of a device that is sent to a peer or received from a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerBuffer {
    /// The rank of the peer.
    pub peer: usize,
    /// The address of the first byte.
    pub address: u64,
    /// The number of f32 elements, never 0.
    pub elements: usize,
}

/// Operations that move and add memory of a rank's device: f32 elements at byte addresses. The
/// operations take effect in the order of the calls.
pub trait Transport {
    /// The reason why an operation could not be enqueued.
    type Error;

    /// Sends and receives all parts at the same time: no part waits for another one. Several parts
    /// for the same peer arrive in order.
    ///
    /// # Errors
    /// Those of the transport.
    fn exchange(&mut self, sends: &[PeerBuffer], receives: &[PeerBuffer]) -> Result<(), Self::Error>;

    /// Copies `elements` elements from address `from` to address `to`.
    ///
    /// # Errors
    /// Those of the transport.
    fn copy(&mut self, from: u64, to: u64, elements: usize) -> Result<(), Self::Error>;

    /// Performs the additions of `order` on the concatenated vectors of `elements` elements each at
    /// address `vectors`, as [`tree::combine`](crate::tree::combine) does.
    ///
    /// # Errors
    /// Those of the transport.
    fn combine(&mut self, order: &[(usize, usize)], vectors: u64, elements: usize)
    -> Result<(), Self::Error>;
}

/// One rank's part in the all-reduce of a segment: a range of a vector, the same on all ranks.
pub struct SegmentPlan {
    plan: ReductionPlan,
    rank: usize,
}

impl SegmentPlan {
    /// Plans the part of `rank` if the ranks own `ranges` of `leaves` leaves and a segment has
    /// `elements` elements.
    ///
    /// # Errors
    /// [`CollectiveError::Argument`] for ranges that are not a partition of the leaves, or a rank
    /// without a range.
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

    /// The number of elements of device memory that [`Self::all_reduce`] needs in addition to the
    /// vectors.
    pub fn scratch_elements(&self) -> usize {
        self.plan.nodes.len() * self.mine().len()
    }

    /// Sums the segment over all leaves into the segment at `out` on every rank.
    ///
    /// `nodes` are the nodes of this rank, each with the address of the segment in its vector.
    /// `out` may be one of these addresses. `scratch` is the address of [`Self::scratch_elements`]
    /// elements.
    ///
    /// # Errors
    /// [`CollectiveError::Argument`] if the nodes are not the nodes of this rank's range, and the
    /// errors of the transport.
    pub fn all_reduce<T: Transport<Error: From<CollectiveError>>>(
        &self,
        transport: &mut T,
        nodes: &[(NodeId, u64)],
        scratch: u64,
        out: u64,
    ) -> Result<(), T::Error> {
        let checked = self.plan.check(self.rank, nodes.iter().map(|(id, _)| id));
        checked.map_err(CollectiveError::Argument)?;
        self.reduce(transport, nodes, scratch, out)?;
        self.gather(transport, out)
    }

    /// Sends the slices of this rank's nodes to their owners and sums this rank's slice over all
    /// nodes.
    fn reduce<T: Transport>(
        &self,
        transport: &mut T,
        nodes: &[(NodeId, u64)],
        scratch: u64,
        out: u64,
    ) -> Result<(), T::Error> {
        let mine = self.mine();
        let len = mine.len();
        let scratch_address = |node: usize| element_address(scratch, node * len);
        let sends = self.peers().flat_map(|peer| {
            let slice = self.plan.slice(peer);
            nodes
                .iter()
                .map(move |(_, node)| peer_buffer(peer, element_address(*node, slice.start), slice.len()))
        });
        let receives = self.peers().flat_map(|peer| {
            self.plan.owned[peer].clone().map(move |node| peer_buffer(peer, scratch_address(node), len))
        });
        exchange(transport, sends, receives)?;
        if mine.is_empty() {
            return Ok(());
        }
        for (node, (_, vector)) in self.plan.owned[self.rank].clone().zip(nodes) {
            transport.copy(element_address(*vector, mine.start), scratch_address(node), len)?;
        }
        if !self.plan.order.is_empty() {
            transport.combine(&self.plan.order, scratch, len)?;
        }
        transport.copy(scratch, element_address(out, mine.start), len)
    }

    /// Sends this rank's slice of `out` to all peers and receives their slices.
    fn gather<T: Transport>(&self, transport: &mut T, out: u64) -> Result<(), T::Error> {
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

    /// The other ranks, starting at the next rank and wrapping around.
    fn peers(&self) -> impl Iterator<Item = usize> {
        let (rank, world_size) = (self.rank, self.plan.owned.len());
        (1..world_size).map(move |distance| (rank + distance) % world_size)
    }
}

/// Makes one grouped call with all parts that are not empty, or no call if all parts are empty.
fn exchange<T: Transport>(
    transport: &mut T,
    sends: impl Iterator<Item = PeerBuffer>,
    receives: impl Iterator<Item = PeerBuffer>,
) -> Result<(), T::Error> {
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

/// Returns the address of an element.
fn element_address(vector: u64, element: usize) -> u64 {
    vector + element as u64 * ELEMENT_BYTES
}
