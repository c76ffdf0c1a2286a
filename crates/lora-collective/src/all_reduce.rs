//! The all-reduce over the canonical tree, between the memories of hosts.
//!
//! The vector is divided into one slice per rank. First, every rank sends each slice of its nodes
//! to the owner of the slice, and the owner adds them in tree order. Then every owner sends its
//! sums to all ranks. With a vector of `S` bytes and `n` ranks, a rank that owns `p` nodes sends
//! `(p + 1) S (n - 1) / n` bytes. Both phases send frames of [`FRAME_ELEMENTS`] elements per node,
//! so that little memory is needed besides the vectors and the additions stay in the cache.

use std::ops::Range;

use crate::error::PeerFailure;
use crate::link::{Call, CallFailure};
use crate::mesh::Mesh;
use crate::reduction_plan::ReductionPlan;
use crate::tree::{NodeId, combine};

/// Elements of a node in one frame.
const FRAME_ELEMENTS: usize = 1 << 15;

/// The plan, and its arguments, which the ranks compare.
pub(crate) struct TreeAllReduce {
    plan: ReductionPlan,
    /// The arguments as bytes. Equal arguments give equal plans.
    arguments: Vec<u8>,
}

impl TreeAllReduce {
    /// Plans the sum of vectors of `elements` elements. The other arguments are those of
    /// [`Group::all_reduce_tree`](crate::Group::all_reduce_tree).
    ///
    /// # Errors
    /// A message that names the invalid argument.
    pub(crate) fn new(
        leaves: usize,
        ranges: &[Range<usize>],
        world_size: usize,
        elements: usize,
    ) -> Result<Self, String> {
        let numbers = [leaves, elements].into_iter().chain(ranges.iter().map(|range| range.end));
        let arguments = numbers.flat_map(|number| (number as u64).to_le_bytes()).collect();
        Ok(Self { plan: ReductionPlan::new(leaves, ranges, world_size, elements)?, arguments })
    }

    /// Checks that `nodes` are the nodes of `rank` and have `elements` elements.
    ///
    /// # Errors
    /// A message that names the invalid argument.
    pub(crate) fn check(
        &self,
        rank: usize,
        nodes: &[(NodeId, &[f32])],
        elements: usize,
    ) -> Result<(), String> {
        self.plan.check(rank, nodes.iter().map(|(id, _)| id))?;
        match nodes.iter().find(|(_, vector)| vector.len() != elements) {
            None => Ok(()),
            Some((_, vector)) => Err(format!("a node has {} elements, the sum {elements}", vector.len())),
        }
    }

    /// Sums the `nodes` of all ranks into `out`. `vectors` is a buffer.
    pub(crate) fn run(
        &self,
        mesh: &Mesh,
        call: &Call,
        nodes: &[(NodeId, &[f32])],
        vectors: &mut Vec<f32>,
        out: &mut [f32],
    ) -> Result<(), CallFailure> {
        self.agree(mesh, call)?;
        let slice = self.plan.slice(mesh.rank);
        self.reduce(mesh, call, nodes, vectors, &mut out[slice])?;
        self.gather(mesh, call, out)
    }

    /// Waits for all ranks and checks that they have the same arguments.
    fn agree(&self, mesh: &Mesh, call: &Call) -> Result<(), CallFailure> {
        let all = mesh.gather(call, &self.arguments, self.arguments.len())?;
        match all.iter().position(|arguments| *arguments != self.arguments) {
            Some(rank) => Err(CallFailure::Failed { rank, failure: PeerFailure::Arguments }),
            None => Ok(()),
        }
    }

    /// Sends the slices of this rank's nodes to their owners and sums this rank's slice over all
    /// nodes into `sums`.
    fn reduce(
        &self,
        mesh: &Mesh,
        call: &Call,
        nodes: &[(NodeId, &[f32])],
        vectors: &mut Vec<f32>,
        sums: &mut [f32],
    ) -> Result<(), CallFailure> {
        let plan = &self.plan;
        vectors.resize(plan.nodes.len() * FRAME_ELEMENTS.min(sums.len()), 0.0);
        mesh.exchange(
            call,
            |link| {
                frames(plan.slice(link.rank)).try_for_each(|frame| {
                    let parts: Vec<&[u8]> = nodes
                        .iter()
                        .map(|(_, vector)| bytemuck::cast_slice(&vector[frame.clone()]))
                        .collect();
                    link.send(call, mesh.indirect_timeout(), &parts)
                })
            },
            || {
                for (frame, sum) in frames(plan.slice(mesh.rank)).zip(sums.chunks_mut(FRAME_ELEMENTS)) {
                    let len = frame.len();
                    let elements = |owned: &Range<usize>| owned.start * len..owned.end * len;
                    for link in &mesh.links {
                        let received = &mut vectors[elements(&plan.owned[link.rank])];
                        link.receive_into(call, mesh.timeout, bytemuck::cast_slice_mut(received))?;
                    }
                    let own = vectors[elements(&plan.owned[mesh.rank])].chunks_mut(len);
                    own.zip(nodes).for_each(|(own, (_, vector))| own.copy_from_slice(&vector[frame.clone()]));
                    combine(&plan.order, vectors, len);
                    sum.copy_from_slice(&vectors[..len]);
                }
                Ok(())
            },
        )
    }

    /// Sends this rank's slice of `out` to all peers and receives their slices.
    fn gather(&self, mesh: &Mesh, call: &Call, out: &mut [f32]) -> Result<(), CallFailure> {
        let mut slices = Vec::with_capacity(mesh.world_size());
        let mut rest = out;
        for rank in 0..mesh.world_size() {
            let (slice, after) = rest.split_at_mut(self.plan.slice(rank).len());
            slices.push(slice.chunks_mut(FRAME_ELEMENTS));
            rest = after;
        }
        let mine: Vec<&[f32]> = slices[mesh.rank].by_ref().map(|frame| &*frame).collect();
        mesh.exchange(
            call,
            |link| {
                mine.iter().try_for_each(|frame| {
                    link.send(call, mesh.indirect_timeout(), &[bytemuck::cast_slice(frame)])
                })
            },
            || {
                // One frame per peer at a time, so that no peer waits until another peer's whole
                // slice has been received.
                let most = slices.iter().map(|frames| frames.len()).max().unwrap_or(0);
                for _ in 0..most {
                    for link in &mesh.links {
                        if let Some(frame) = slices[link.rank].next() {
                            let frame = bytemuck::cast_slice_mut(frame);
                            link.receive_into(call, mesh.indirect_timeout(), frame)?;
                        }
                    }
                }
                Ok(())
            },
        )
    }
}

fn frames(slice: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = slice.end;
    slice.step_by(FRAME_ELEMENTS).map(move |start| start..(start + FRAME_ELEMENTS).min(end))
}
