//! The partition of the leaves among ranks.

use std::ops::Range;

use super::{TreeError, largest_nodes};

/// Divides `leaves` leaves among `ranks` ranks into contiguous ranges in rank order. With fewer
/// leaves than ranks (at the end of an epoch), each of the first ranks gets one leaf and the others
/// get none.
///
/// The traffic of a rank in an all-reduce grows with the number of nodes that its range splits
/// into. The ranges may therefore be uneven if that gives fewer nodes, but no rank gets more than
/// `c + c/8` leaves (integer division), where `c` is an even share, rounded up. Among the allowed
/// partitions the boundaries minimize, in this order: the largest number of nodes of a rank, the
/// largest number of leaves of a rank, and the number of nodes of all ranks. Of the partitions that
/// are still equal, the one with the smallest last ranges is chosen. (32 leaves on 3 ranks: 12, 12
/// and 8.) The result is a pure function of the two numbers.
///
/// # Errors
/// [`TreeError::Partition`] if there are no leaves or no ranks.
pub fn partition(leaves: usize, ranks: usize) -> Result<Vec<Range<usize>>, TreeError> {
    if ranks == 0 || leaves == 0 {
        return Err(TreeError::Partition { leaves, ranks });
    }
    let idle = ranks.saturating_sub(leaves);
    let ranks = ranks - idle;
    let even = leaves.div_ceil(ranks);
    let search = PartitionSearch { leaves, ranks, cap: even + even / 8 };
    let nodes = |range: &Range<usize>| largest_nodes(leaves, range).count();

    let (most_nodes, _) = search.best(|range| Some(nodes(range)), usize::max);
    let few = |range: &Range<usize>| nodes(range) <= most_nodes;
    let (most_leaves, _) = search.best(|range| few(range).then_some(range.len()), usize::max);
    let (_, ends) = search.best(
        |range| (range.len() <= most_leaves && few(range)).then(|| nodes(range)),
        |sum, cost| sum + cost,
    );

    let starts = std::iter::once(0).chain(ends.iter().copied());
    let busy = starts.zip(ends.iter().copied()).map(|(start, end)| start..end);
    Ok(busy.chain(std::iter::repeat_n(leaves..leaves, idle)).collect())
}

/// Returns the bytes that a rank sends, and receives, in the all-reduce of a vector of `bytes`
/// bytes over a step of `leaves` leaves: the largest number of any of `ranks` ranks. A rank whose
/// range splits into `p` nodes sends `(p + 1) bytes (ranks - 1) / ranks` bytes.
///
/// # Errors
/// Those of [`partition`].
pub fn all_reduce_bytes(leaves: usize, ranks: usize, bytes: u64) -> Result<u64, TreeError> {
    let ranges = partition(leaves, ranks)?;
    let most = ranges.iter().map(|range| largest_nodes(leaves, range).count()).max().unwrap_or(0);
    Ok((most as u64 + 1) * bytes * (ranks as u64 - 1) / ranks as u64)
}

/// Boundaries by dynamic programming over (ranks so far, end of the last range).
struct PartitionSearch {
    leaves: usize,
    ranks: usize,
    /// The largest number of leaves of a rank.
    cap: usize,
}

impl PartitionSearch {
    /// Returns the smallest total cost and the ends of the ranges that have this cost. The total
    /// combines the costs of the ranges with `fold`. A range whose cost is `None` is not allowed.
    fn best(
        &self,
        cost: impl Fn(&Range<usize>) -> Option<usize>,
        fold: impl Fn(usize, usize) -> usize,
    ) -> (usize, Vec<usize>) {
        // table[r][end]: the smallest total of ranks 0..=r up to `end`, and the start of rank r's
        // range that gives this total.
        let mut table: Vec<Vec<Option<(usize, usize)>>> = Vec::with_capacity(self.ranks);
        for rank in 0..self.ranks {
            let mut row = vec![None; self.leaves + 1];
            for end in self.ends(rank) {
                let mut least: Option<(usize, usize)> = None;
                for start in self.starts(rank, end) {
                    let before = match rank {
                        0 => Some(0),
                        _ => table[rank - 1][start].map(|(total, _)| total),
                    };
                    let total = before.and_then(|before| Some(fold(before, cost(&(start..end))?)));
                    // `<=` prefers the later start among equal totals, which makes the last ranges
                    // smaller.
                    if let Some(total) = total.filter(|total| least.is_none_or(|(least, _)| *total <= least))
                    {
                        least = Some((total, start));
                    }
                }
                row[end] = least;
            }
            table.push(row);
        }
        let mut ends = vec![self.leaves; self.ranks];
        for rank in (1..self.ranks).rev() {
            ends[rank - 1] = table[rank][ends[rank]].map_or(0, |(_, start)| start);
        }
        let total = table[self.ranks - 1][self.leaves].map_or(0, |(total, _)| total);
        (total, ends)
    }

    /// The possible ends of the range of `rank`: every rank before and after it must get at least
    /// one leaf and at most `cap`.
    fn ends(&self, rank: usize) -> std::ops::RangeInclusive<usize> {
        let after = self.ranks - rank - 1;
        let first = (rank + 1).max(self.leaves.saturating_sub(after * self.cap));
        let last = (self.leaves - after).min((rank + 1) * self.cap);
        first..=last
    }

    /// The possible starts of the range of `rank` if it ends at `end`.
    fn starts(&self, rank: usize, end: usize) -> Range<usize> {
        if rank == 0 { 0..1 } else { end.saturating_sub(self.cap)..end }
    }
}
