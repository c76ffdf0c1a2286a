//! The plan of an all-reduce: which rank owns which nodes and which slice of the vector. The
//! all-reduces over TCP and between devices share it.

use std::ops::Range;

use crate::tree::{NodeId, TreeError, merge_order, nodes_in};

/// The plan, derived from arguments that are equal on all ranks.
pub(crate) struct ReductionPlan {
    world_size: usize,
    /// Length of the vector.
    elements: usize,
    /// The nodes of all ranks in leaf order.
    pub(crate) nodes: Vec<NodeId>,
    /// The part of `nodes` that each rank owns.
    pub(crate) owned: Vec<Range<usize>>,
    /// The additions that sum the nodes, as [`merge_order`] lists them.
    pub(crate) order: Vec<(usize, usize)>,
}

impl ReductionPlan {
    /// # Errors
    /// A message that names the invalid argument.
    pub(crate) fn new(
        leaves: usize,
        ranges: &[Range<usize>],
        world_size: usize,
        elements: usize,
    ) -> Result<Self, String> {
        if ranges.len() != world_size {
            return Err(format!("{} ranges for {world_size} ranks", ranges.len()));
        }
        let (mut nodes, mut owned) = (Vec::new(), Vec::new());
        for range in ranges {
            let first = nodes.len();
            nodes.extend(nodes_in(leaves, range).map_err(|error| error.to_string())?);
            owned.push(first..nodes.len());
        }
        let order = merge_order(leaves, &nodes).map_err(|error: TreeError| error.to_string())?;
        Ok(Self { world_size, elements, nodes, owned, order })
    }

    /// The part of the vector that `rank` sums. It begins at a multiple of four elements, for
    /// aligned loads of 16 bytes, unless the vector has fewer than four elements per rank.
    pub(crate) fn slice(&self, rank: usize) -> Range<usize> {
        let unit = if self.elements < 4 * self.world_size { 1 } else { 4 };
        let bound = |rank| match rank {
            rank if rank == self.world_size => self.elements,
            rank => ((self.elements / unit) as u128 * rank as u128 / self.world_size as u128) as usize * unit,
        };
        bound(rank)..bound(rank + 1)
    }

    /// Checks that `nodes` are the nodes of `rank`.
    ///
    /// # Errors
    /// A message if they are not.
    pub(crate) fn check<'a>(
        &self,
        rank: usize,
        nodes: impl Iterator<Item = &'a NodeId>,
    ) -> Result<(), String> {
        match nodes.eq(&self.nodes[self.owned[rank].clone()]) {
            true => Ok(()),
            false => Err(format!("the nodes given are not those of rank {rank}'s leaves")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::partition;

    #[test]
    fn slices_are_even_and_16_byte_aligned() {
        for world_size in 1..=9 {
            for elements in (0..200).chain([1_000_003, (1 << 40) + 1]) {
                let ranges = partition(world_size, world_size).unwrap();
                let plan = ReductionPlan::new(world_size, &ranges, world_size, elements).unwrap();
                let slices: Vec<_> = (0..world_size).map(|rank| plan.slice(rank)).collect();
                assert_eq!((slices[0].start, slices[world_size - 1].end), (0, elements));
                assert!(slices.windows(2).all(|pair| pair[0].end == pair[1].start), "{slices:?}");
                let lengths = || slices.iter().map(|slice| slice.len());
                assert!(lengths().max() <= lengths().min().map(|least| least + 7), "{slices:?}");
                let aligned = slices.iter().all(|slice| slice.start.is_multiple_of(4));
                assert!(aligned || elements < 4 * world_size, "{slices:?}");
            }
        }
    }
}
