//! Who stays in a group that broke. A pure function of what its members report.
//!
//! The dead go. Of the living only those go that could not connect with each other when the group was formed, and as few of
//! them as possible: a rank that was merely suspected while training is as likely to have suffered from somebody else's death.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// The most ranks with trouble for which the smallest set is sought exactly.
const EXACT_RANKS: usize = 20;

/// What is known of a member, by rank.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MemberReport {
    /// It is connected and can go on.
    pub(crate) alive: bool,
    /// Ranks that its error pointed at.
    pub(crate) suspects: Vec<usize>,
    /// Ranks that it could not connect with when the group was formed.
    pub(crate) unreachable: Vec<usize>,
}

/// Who stays and who goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MembershipDecision {
    /// Ranks that stay, ascending.
    pub(crate) keep: Vec<usize>,
    /// Ranks that go, ascending.
    pub(crate) evicted: Vec<(usize, EvictionReason)>,
}

/// Why a rank goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EvictionReason {
    /// It is not alive.
    Dead,
    /// It and these living ranks could not reach each other.
    Unreachable(Vec<usize>),
}

/// Splits the members of a broken group. Ranks that do not exist are ignored.
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
        // A dead peer explains its trouble: forming ended before the others could be reached.
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

/// The smallest set of ranks that touches every edge; of several, the one with the highest ranks. With very many ranks in
/// trouble a small set, not always the smallest.
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

/// Branch and bound over sets of ranks, each a number with a bit per rank: the higher the rank, the higher the bit.
struct CoverSearch {
    neighbours: Vec<u32>,
    best: u32,
}

impl CoverSearch {
    /// Looks for better sets that contain `cover` and beyond it only ranks of `open`, whose edges are not covered yet.
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

/// The rank with the most edges goes first; of several, the highest.
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
