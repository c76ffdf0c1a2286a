//! The canonical tree: the same bits for any partition, and partitions with little traffic.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::ops::Range;

use lora_collective::tree::{
    NodeId, TreeAccumulator, TreeError, all_reduce_bytes, combine, merge_order, nodes_in, partition, sum_f64,
};
use lora_test_kit::numbers::bits;
use proptest::prelude::*;

/// A literal implementation of the definition; `None` if the node has no leaves.
fn node(leaves: &[Vec<f32>], level: u32, index: usize) -> Option<Vec<f32>> {
    if level == 0 {
        return leaves.get(index).cloned();
    }
    let left = node(leaves, level - 1, 2 * index)?;
    match node(leaves, level - 1, 2 * index + 1) {
        None => Some(left),
        Some(right) => Some(left.iter().zip(&right).map(|(a, b)| a + b).collect()),
    }
}

/// Returns the nodes of `range` and checks the pending sums and the number of merges for each leaf.
fn accumulate(
    sums: &mut TreeAccumulator<Vec<f32>>,
    leaves: &[Vec<f32>],
    range: Range<usize>,
) -> Vec<(NodeId, Vec<f32>)> {
    sums.start(leaves.len(), range.clone()).unwrap();
    for leaf in &leaves[range] {
        let mut vector = sums.free().unwrap_or_default();
        vector.clone_from(leaf);
        let pending: Vec<Vec<f32>> = sums.pending().cloned().collect();
        let (merges, mut merged) = (sums.merges(), 0);
        let add = |a: &mut Vec<f32>, b: &Vec<f32>| {
            assert_eq!(*a, pending[merged], "the newest is merged first");
            merged += 1;
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            Ok::<(), TreeError>(())
        };
        sums.push(vector, add).unwrap();
        assert_eq!((merged, sums.pending().count()), (merges, pending.len() + 1 - merges));
    }
    assert_eq!(sums.merges(), 0);
    sums.finish().unwrap()
}

/// Up to 69 leaves of 3 elements of very different magnitudes, and cuts between the leaves.
fn leaves_and_cuts() -> impl Strategy<Value = (Vec<Vec<f32>>, Vec<usize>)> {
    let element = (-1.0f32..1.0, -12i32..12).prop_map(|(mantissa, exponent)| mantissa * 2f32.powi(exponent));
    let leaves = prop::collection::vec(prop::collection::vec(element, 3), 1..70);
    leaves.prop_flat_map(|leaves| {
        let len = leaves.len();
        (Just(leaves), prop::collection::btree_set(1..=len, 0..8)).prop_map(move |(leaves, mut cuts)| {
            cuts.insert(len);
            (leaves, cuts.into_iter().collect())
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_partition_matches_the_serial_tree((leaves, cuts) in leaves_and_cuts()) {
        let mut sums = TreeAccumulator::new();
        let (mut ids, mut vectors, mut start) = (Vec::new(), Vec::new(), 0);
        for end in cuts {
            let nodes = accumulate(&mut sums, &leaves, start..end);
            let got: Vec<NodeId> = nodes.iter().map(|(id, _)| *id).collect();
            prop_assert_eq!(&got, &nodes_in(leaves.len(), &(start..end)).unwrap());
            ids.extend(got);
            nodes.iter().for_each(|(_, vector)| vectors.extend_from_slice(vector));
            sums.recycle(nodes);
            start = end;
        }
        let order = merge_order(leaves.len(), &ids).unwrap();
        combine(&order, &mut vectors, 3);
        let level = leaves.len().next_power_of_two().ilog2();
        prop_assert_eq!(bits(&vectors[..3]), bits(&node(&leaves, level, 0).unwrap()));
    }

    #[test]
    fn scalars_are_summed_in_the_order_of_the_tree(values in prop::collection::vec(-1e6f32..1e6, 1..200)) {
        // Products with pi use the whole mantissa of an f64, so another order gives other bits.
        let values: Vec<f64> = values.iter().map(|x| f64::from(*x) * std::f64::consts::PI).collect();
        let mut level = values.clone();
        while level.len() > 1 {
            level = level.chunks(2).map(|pair| pair.iter().copied().reduce(|a, b| a + b).unwrap()).collect();
        }
        prop_assert_eq!(sum_f64(&values).to_bits(), level[0].to_bits());
    }

    #[test]
    fn partitions_cover_all_leaves_within_the_allowed_imbalance(leaves in 1usize..600, ranks in 1usize..20) {
        prop_assume!(ranks <= leaves);
        let ranges = partition(leaves, ranks).unwrap();
        prop_assert_eq!(ranges.len(), ranks);
        prop_assert_eq!((ranges[0].start, ranges[ranks - 1].end), (0, leaves));
        prop_assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
        let even = leaves.div_ceil(ranks);
        prop_assert!(ranges.iter().all(|range| !range.is_empty() && range.len() <= even + even / 8));
    }
}

#[test]
fn no_other_partition_has_fewer_nodes_per_rank() {
    for leaves in 3..40_usize {
        let even = leaves.div_ceil(3);
        let most = |cuts: [usize; 4]| {
            cuts.windows(2).map(|cut| nodes_in(leaves, &(cut[0]..cut[1])).unwrap().len()).max().unwrap()
        };
        let allowed = |cuts: [usize; 4]| cuts.windows(2).all(|cut| cut[1] - cut[0] <= even + even / 8);
        let all = (1..leaves - 1).flat_map(|a| (a + 1..leaves).map(move |b| [0, a, b, leaves]));
        let least = all.filter(|cuts| allowed(*cuts)).map(most).min().unwrap();
        let ranges = partition(leaves, 3).unwrap();
        assert_eq!(most([0, ranges[0].end, ranges[1].end, leaves]), least, "{leaves} leaves: {ranges:?}");
    }
}

#[test]
fn known_partitions() {
    assert_eq!(partition(32, 3).unwrap(), [0..12, 12..24, 24..32]);
    assert_eq!(partition(32, 4).unwrap(), [0..8, 8..16, 16..24, 24..32]);
    assert_eq!(partition(5, 1).unwrap(), vec![0..5]);
    assert_eq!(partition(3, 3).unwrap(), [0..1, 1..2, 2..3]);
    assert_eq!(partition(4096, 64).unwrap()[63], 4032..4096);
    assert_eq!(partition(2, 3).unwrap(), [0..1, 1..2, 2..2]);
    assert_eq!(partition(0, 3), Err(TreeError::Partition { leaves: 0, ranks: 3 }));
    assert_eq!(partition(2, 0), Err(TreeError::Partition { leaves: 2, ranks: 0 }));
}

#[test]
fn an_incomplete_last_subtree_is_one_node() {
    let ids = |range| nodes_in(7, &range).unwrap().iter().map(|n| (n.level, n.index)).collect::<Vec<_>>();
    assert_eq!(ids(4..7), [(2, 1)]);
    assert_eq!(ids(6..7), [(0, 6)]);
    assert_eq!(ids(0..7), [(3, 0)]);
    assert_eq!(ids(1..6), [(0, 1), (1, 1), (1, 2)]);
}

#[test]
fn vectors_are_reused() {
    let mut sums = TreeAccumulator::new();
    for made in [3, 0, 0] {
        let mut fresh = 0;
        sums.start(8, 0..7).unwrap();
        for _ in 0..7 {
            let vector = sums.free().unwrap_or_else(|| {
                fresh += 1;
                vec![0.0]
            });
            sums.push(vector, |_, _| Ok::<(), TreeError>(())).unwrap();
        }
        assert_eq!(fresh, made, "at most two sums are pending while a leaf is filled");
        let nodes = sums.finish().unwrap();
        assert_eq!(nodes.len(), 3);
        sums.recycle(nodes);
    }
}

#[test]
fn misuse_is_an_error() {
    let nothing = |_: &mut (), _: &()| Ok::<(), TreeError>(());
    let mut sums = TreeAccumulator::new();
    assert_eq!(sums.start(4, 2..5), Err(TreeError::Range { range: 2..5, leaves: 4 }));
    sums.start(4, 2..2).unwrap();
    assert_eq!(sums.finish().unwrap(), []);
    sums.start(4, 2..4).unwrap();
    sums.push((), nothing).unwrap();
    let full = TreeError::Count { range: 0..0, got: 0 };
    assert_eq!(sums.push((), |_, _| Err(full.clone())), Err(full));
    assert_eq!(sums.finish(), Err(TreeError::Count { range: 2..4, got: 1 }));
    sums.start(4, 2..3).unwrap();
    sums.push((), nothing).unwrap();
    assert_eq!(sums.push((), nothing), Err(TreeError::Count { range: 2..3, got: 2 }));

    let (a, b) = (NodeId { level: 1, index: 0 }, NodeId { level: 1, index: 1 });
    assert_eq!(merge_order(4, &[a, b]).unwrap(), [(0, 1)]);
    assert_eq!(merge_order(4, &[a]), Err(TreeError::Cover { leaves: 4, leaf: 2 }));
    assert_eq!(merge_order(4, &[b, a]), Err(TreeError::Cover { leaves: 4, leaf: 0 }));
    assert_eq!(merge_order(4, &[a, b, b]), Err(TreeError::Cover { leaves: 4, leaf: 4 }));
}

#[test]
fn aligned_ranges_have_ring_all_reduce_traffic() {
    // Each of 4 ranks has one node of 8 leaves: it sends the slices of the node to their owners,
    // and its own sums to all ranks.
    assert_eq!(all_reduce_bytes(32, 4, 1000), Ok(2 * 1000 * 3 / 4));
    // The ranges of 12, 12 and 8 leaves have at most two nodes.
    assert_eq!(all_reduce_bytes(32, 3, 1000), Ok(3 * 1000 * 2 / 3));
    assert_eq!(all_reduce_bytes(5, 1, 1000), Ok(0));
    assert!(all_reduce_bytes(0, 1, 1000).is_err());
}
