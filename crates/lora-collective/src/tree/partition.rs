//! Who owns which leaves.

use std::ops::Range;

use super::{TreeError, largest_nodes};

/// Shares `leaves` leaves among `ranks` ranks: contiguous ranges in rank order. With fewer leaves than
/// ranks (the tail of an epoch), each of the first ranks gets one and the others nothing.
///
/// A rank's traffic in an all-reduce grows with the number of nodes its range falls into, so an even share is given
/// up for fewer nodes, as far as no rank gets more than `c + c/8` leaves (integer division), where `c` is an even
/// share rounded up. Among those shares the boundaries minimize, in this order: the largest number of nodes of a rank,
/// the largest number of leaves of a rank, the number of nodes of all ranks; what ties then, ends with the smallest last
/// ranges. (32 leaves on 3 ranks: 12, 12 and 8.) The result is a pure function of the two numbers.
///
/// # Errors
/// [`TreeError::Partition`] where there are no leaves or no ranks.
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

/// Bytes that a rank sends in the all-reduce of a vector of `bytes` over a step of `leaves` leaves, and receives: the most of any of
/// `ranks` ranks. One whose range falls into `p` nodes sends `(p + 1) bytes (ranks - 1) / ranks`.
///
/// # Errors
/// As of [`partition`].
pub fn all_reduce_bytes(leaves: usize, ranks: usize, bytes: u64) -> Result<u64, TreeError> {
    let ranges = partition(leaves, ranks)?;
    let most = ranges.iter().map(|range| largest_nodes(leaves, range).count()).max().unwrap_or(0);
    Ok((most as u64 + 1) * bytes * (ranks as u64 - 1) / ranks as u64)
}

/// Boundaries by dynamic programming over (ranks so far, end of the last range).
struct PartitionSearch {
    leaves: usize,
    ranks: usize,
    /// The most leaves a rank may get.
    cap: usize,
}

impl PartitionSearch {
    /// The least total cost and the ends of the ranges that have it, where the total folds the ranges' costs with
    /// `fold`, and a range without a cost is not allowed.
    fn best(
        &self,
        cost: impl Fn(&Range<usize>) -> Option<usize>,
        fold: impl Fn(usize, usize) -> usize,
    ) -> (usize, Vec<usize>) {
        // table[r][end]: the least total of ranks 0..=r up to `end`, and the start of rank r's range that gives it.
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
                    // `<=`: of equal totals the one with the later start, which leaves less to the last ranks.
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

    /// Where rank `rank`'s range may end, given what the ranks on either side must and can take.
    fn ends(&self, rank: usize) -> std::ops::RangeInclusive<usize> {
        let after = self.ranks - rank - 1;
        let first = (rank + 1).max(self.leaves.saturating_sub(after * self.cap));
        let last = (self.leaves - after).min((rank + 1) * self.cap);
        first..=last
    }

    /// Where the range of `rank` may start if it ends at `end`.
    fn starts(&self, rank: usize, end: usize) -> Range<usize> {
        if rank == 0 { 0..1 } else { end.saturating_sub(self.cap)..end }
    }
}
