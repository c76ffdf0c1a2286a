use proptest::prelude::*;

use super::*;

/// Living members. In each of `pairs` the first rank reports that it could not reach the second.
fn living(n: usize, pairs: &[(usize, usize)]) -> Vec<MemberReport> {
    let mut members = vec![MemberReport { alive: true, ..MemberReport::default() }; n];
    for &(rank, peer) in pairs {
        members[rank].unreachable.push(peer);
    }
    members
}

fn evicted(members: &[MemberReport]) -> Vec<usize> {
    decide_membership(members).evicted.into_iter().map(|(rank, _)| rank).collect()
}

#[test]
fn dead_members_are_evicted_and_members_that_suspect_them_stay() {
    let mut members = living(4, &[]);
    members[2].alive = false;
    members[0].unreachable = vec![2, 3];
    members[1].suspects = vec![2];
    members[1].unreachable = vec![3];
    let result = decide_membership(&members);
    assert_eq!(result, MembershipDecision { keep: vec![0, 1, 3], evicted: vec![(2, EvictionReason::Dead)] });
}

#[test]
fn reports_of_dead_members_are_ignored() {
    let mut members = living(3, &[(2, 0)]);
    members[2].alive = false;
    assert_eq!(evicted(&members), [2]);
}

#[test]
fn suspicion_alone_evicts_no_member() {
    let mut members = living(3, &[]);
    members[0].suspects = vec![1];
    members[1].suspects = vec![0, 2];
    assert_eq!(decide_membership(&members).keep, [0, 1, 2]);
}

#[test]
fn of_two_unreachable_ranks_the_higher_is_evicted() {
    let result = decide_membership(&living(3, &[(0, 2)]));
    assert_eq!(
        result,
        MembershipDecision { keep: vec![0, 1], evicted: vec![(2, EvictionReason::Unreachable(vec![0]))] }
    );
    assert_eq!(decide_membership(&living(3, &[(2, 0)])), result, "either rank may report it");
}

#[test]
fn a_rank_that_no_other_reaches_is_the_only_one_evicted() {
    let result = decide_membership(&living(5, &[(0, 1), (2, 1), (1, 4)]));
    assert_eq!(result.evicted, [(1, EvictionReason::Unreachable(vec![0, 2, 4]))]);
}

#[test]
fn the_cover_is_smaller_than_the_greedy_one() {
    // Rank 0 has the most edges, but is in no smallest cover: its three neighbours cover every
    // edge.
    let pairs = [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 6)];
    assert_eq!(evicted(&living(7, &pairs)), [1, 2, 3]);
}

#[test]
fn ranks_that_do_not_exist_are_ignored() {
    let mut members = living(2, &[(0, 0), (0, 7)]);
    members[1].suspects = vec![9];
    assert_eq!(decide_membership(&members).keep, [0, 1]);
}

#[test]
fn a_partitioned_large_group_keeps_one_half() {
    // No rank of one half reaches a rank of the other half.
    let pairs: Vec<_> = (0..20).flat_map(|a| (20..40).map(move |b| (a, b))).collect();
    let result = decide_membership(&living(40, &pairs));
    assert_eq!(result.keep, (0..20).collect::<Vec<_>>());
}

/// Groups of up to `most` ranks with few edges between them.
fn groups(most: usize) -> impl Strategy<Value = Vec<MemberReport>> {
    let ranks = move |n: usize| prop::collection::vec(0..most + 2, 0..=n);
    let member = (prop::bool::weighted(0.9), ranks(1), prop_oneof![3 => ranks(0), 2 => ranks(4)]);
    let member =
        member.prop_map(|(alive, suspects, unreachable)| MemberReport { alive, suspects, unreachable });
    prop::collection::vec(member, 0..=most)
}

/// Pairs of living ranks where one could not reach the other, and reports no dead rank.
fn pairs(members: &[MemberReport]) -> Vec<(usize, usize)> {
    let dead = |rank: &usize| *rank < members.len() && !members[*rank].alive;
    let mut pairs = Vec::new();
    for (rank, member) in members.iter().enumerate() {
        let explained = member.suspects.iter().any(dead) || member.unreachable.iter().any(dead);
        for &peer in &member.unreachable {
            if member.alive && !explained && peer < members.len() && members[peer].alive && peer != rank {
                pairs.push((rank, peer));
            }
        }
    }
    pairs
}

/// The best set by exhaustive search: the smallest, and among those the highest as a number.
fn brute_force(n: usize, pairs: &[(usize, usize)]) -> Vec<usize> {
    let covers = |set: u32| pairs.iter().all(|(a, b)| set & (1 << a | 1 << b) != 0);
    let best = (0..1_u32 << n).filter(|set| covers(*set)).min_by_key(|set| (set.count_ones(), Reverse(*set)));
    (0..n).filter(|rank| best.unwrap() & (1 << rank) != 0).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_smallest_set_is_evicted(members in groups(10)) {
        let result = decide_membership(&members);
        let mut expected = brute_force(members.len(), &pairs(&members));
        expected.extend((0..members.len()).filter(|rank| !members[*rank].alive));
        expected.sort_unstable();
        prop_assert_eq!(evicted(&members), expected.clone());
        let kept: Vec<_> = (0..members.len()).filter(|rank| !expected.contains(rank)).collect();
        prop_assert_eq!(result.keep, kept);
    }

    #[test]
    fn kept_members_reach_each_other_and_healthy_members_are_kept(members in groups(60)) {
        let result = decide_membership(&members);
        let pairs = pairs(&members);
        for (a, b) in &pairs {
            prop_assert!(!(result.keep.contains(a) && result.keep.contains(b)), "{a} and {b} are kept");
        }
        for (rank, reason) in &result.evicted {
            match reason {
                EvictionReason::Dead => prop_assert!(!members[*rank].alive),
                EvictionReason::Unreachable(peers) => {
                    prop_assert!(members[*rank].alive && !peers.is_empty());
                    for peer in peers {
                        prop_assert!(pairs.contains(&(*rank, *peer)) || pairs.contains(&(*peer, *rank)));
                    }
                }
            }
        }
        let mut all: Vec<_> = result.evicted.iter().map(|(rank, _)| *rank).chain(result.keep).collect();
        all.sort_unstable();
        prop_assert_eq!(all, (0..members.len()).collect::<Vec<_>>());
    }
}
