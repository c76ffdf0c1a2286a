//! Which members a broken group keeps: a pure function of the members' reports.
//!
//! Dead members are evicted. Living members are evicted only if they could not connect with each
//! other when the group was formed, and as few of them as possible. A suspicion during training
//! evicts no member: the suspected rank may itself have failed because of another rank's death.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// The largest number of ranks with unreachable peers for which the search is exact.
const EXACT_RANKS: usize = 20;

/// The report of one member. Reports are listed by rank.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MemberReport {
    /// The member is connected and can continue.
    pub(crate) alive: bool,
    /// Ranks that the member's error named.
    pub(crate) suspects: Vec<usize>,
    /// Ranks to which the member could not connect when the group was formed.
    pub(crate) unreachable: Vec<usize>,
}

/// The members that stay and the members that are evicted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MembershipDecision {
    /// Ranks that stay, ascending.
    pub(crate) keep: Vec<usize>,
    /// Evicted ranks, ascending.
    pub(crate) evicted: Vec<(usize, EvictionReason)>,
}

/// Why a rank is evicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EvictionReason {
    /// The member is lost or disconnected, or exceeded a time limit.
    Dead,
    /// The member and these living ranks could not reach each other.
    Unreachable(Vec<usize>),
}

/// Decides which members of a broken group stay. Ranks in the reports that do not exist are
/// ignored.
pub(crate) fn decide_membership(members: &[MemberReport]) -> MembershipDecision {
    let mut edges = edges(members);
    let unreachable = smallest_cover(&edges);
    let mut result = MembershipDecision::default();
    for (rank, member) in members.iter().enumerate() {
        if !member.alive {
            result.evicted.push((rank, EvictionReason::Dead));
        } else if unreachable.contains(&rank) {
            let peers = edges.remove(&rank).unwrap_or_default();
            result.evicted.push((rank, EvictionReason::Unreachable(peers.into_iter().collect())));
        } else {
            result.keep.push(rank);
        }
    }
    result
}

/// Neighbours by rank, in both directions.
type Edges = BTreeMap<usize, BTreeSet<usize>>;

/// Pairs of living ranks that could not reach each other.
fn edges(members: &[MemberReport]) -> Edges {
    let is_dead = |rank: &usize| members.get(*rank).is_some_and(|m| !m.alive);
    let is_alive = |rank: usize| members.get(rank).is_some_and(|m| m.alive);
    let mut edges = Edges::new();
    for (rank, member) in members.iter().enumerate().filter(|(_, m)| m.alive) {
        // A dead peer explains the report: the forming ended before the other ranks were reached.
        if member.suspects.iter().chain(&member.unreachable).any(is_dead) {
            continue;
        }
        for &peer in member.unreachable.iter().filter(|&&peer| peer != rank && is_alive(peer)) {
            edges.entry(rank).or_default().insert(peer);
            edges.entry(peer).or_default().insert(rank);
        }
    }
    edges
}

/// The smallest vertex cover: the smallest set of ranks that touches every edge. Among several, the
/// one with the highest ranks. With more than [`EXACT_RANKS`] ranks, a small cover that may not be
/// the smallest.
fn smallest_cover(edges: &Edges) -> BTreeSet<usize> {
    let ranks: Vec<usize> = edges.keys().copied().collect();
    if ranks.len() > EXACT_RANKS {
        return greedy_cover(edges);
    }
    let bit = |rank: &usize| ranks.binary_search(rank).map_or(0, |i| 1_u32 << i);
    let neighbours: Vec<u32> = edges.values().map(|peers| peers.iter().map(bit).sum()).collect();
    let mut search = CoverSearch { neighbours, best: (1 << ranks.len()) - 1 };
    search.branch(0, search.best);
    ranks.iter().enumerate().filter(|(i, _)| search.best & (1 << i) != 0).map(|(_, rank)| *rank).collect()
}

/// Branch and bound over sets of ranks. A set is a number with one bit for each rank; a higher rank
/// has a higher bit.
struct CoverSearch {
    neighbours: Vec<u32>,
    best: u32,
}

impl CoverSearch {
    /// Searches better sets that consist of `cover` and ranks of `open`, the ranks whose edges are
    /// not covered yet.
    fn branch(&mut self, cover: u32, open: u32) {
        if cover.count_ones() > self.best.count_ones() {
            return;
        }
        let degree = |&i: &usize| (self.neighbours[i] & open).count_ones();
        let ranks = (0..self.neighbours.len()).filter(|i| open & (1 << i) != 0);
        match ranks.max_by_key(degree).filter(|i| degree(i) > 0) {
            None => {
                let quality = |set: u32| (Reverse(set.count_ones()), set);
                self.best = if quality(cover) > quality(self.best) { cover } else { self.best };
            }
            Some(rank) => {
                let peers = self.neighbours[rank] & open;
                let rest = open & !(1 << rank);
                self.branch(cover | 1 << rank, rest);
                self.branch(cover | peers, rest & !peers);
            }
        }
    }
}

/// A cover that adds the rank with the most uncovered edges first; among several, the highest.
fn greedy_cover(edges: &Edges) -> BTreeSet<usize> {
    let mut cover = BTreeSet::new();
    let degree = |rank: &usize, cover: &BTreeSet<usize>| edges[rank].difference(cover).count();
    loop {
        let open = edges.keys().filter(|rank| !cover.contains(*rank));
        match open.max_by_key(|rank| (degree(rank, &cover), **rank)).filter(|rank| degree(rank, &cover) > 0) {
            Some(rank) => cover.insert(*rank),
            None => return cover,
        };
    }
}

#[cfg(test)]
mod tests;
