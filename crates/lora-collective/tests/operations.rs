//! Every operation on groups of one to four ranks.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]
#![expect(clippy::single_range_in_vec_init, reason = "the ranges of a group of one")]

mod common;
mod leaves;

use std::ops::Range;

use common::{TEST_TIMEOUT, on_ranks, specs};
use leaves::{nodes_of, serial_sum};
use lora_collective::tree::{NodeId, partition};
use lora_collective::{CancelToken, CollectiveError, Group, MAX_GATHER_BYTES};
use lora_test_kit::numbers::bits;

fn all_reduce(
    group: &mut Group,
    leaves: usize,
    ranges: &[Range<usize>],
    elements: usize,
) -> Result<Vec<f32>, CollectiveError> {
    let nodes = nodes_of(leaves, ranges[group.rank()].clone(), elements);
    let nodes: Vec<(NodeId, &[f32])> = nodes.iter().map(|(id, vector)| (*id, &vector[..])).collect();
    let mut out = vec![f32::NAN; elements];
    group.all_reduce_tree(leaves, ranges, &nodes, &mut out)?;
    Ok(out)
}

fn assert_all_reduce(leaves: usize, ranges: &[Range<usize>], elements: usize) {
    let expected = bits(&serial_sum(leaves, elements));
    let results = on_ranks(ranges.len(), TEST_TIMEOUT, |mut group| {
        all_reduce(&mut group, leaves, ranges, elements).unwrap();
        all_reduce(&mut group, leaves, ranges, elements).unwrap()
    });
    for (rank, result) in results.iter().enumerate() {
        assert!(bits(result) == expected, "rank {rank} of {ranges:?} with {elements} elements");
    }
}

#[test]
fn all_reduce_matches_the_serial_tree_on_any_number_of_ranks() {
    for ranks in 1..=4 {
        for leaves in [4, 7, 32] {
            assert_all_reduce(leaves, &partition(leaves, ranks).unwrap(), 1001);
        }
    }
}

#[test]
fn all_reduce_handles_many_nodes_and_short_vectors() {
    for elements in [0, 1, 3] {
        assert_all_reduce(13, &[0..1, 1..8, 8..11, 11..13], elements);
    }
}

#[test]
fn all_reduce_streams_vectors_of_megabytes() {
    assert_all_reduce(7, &[0..3, 3..5, 5..7], 1_500_001);
}

#[test]
fn all_reduce_traffic_matches_the_formula() {
    let (leaves, elements) = (4, 90_000);
    let ranges = partition(leaves, 2).unwrap();
    let counts = on_ranks(2, TEST_TIMEOUT, |mut group| {
        all_reduce(&mut group, leaves, &ranges, elements).unwrap();
        group.bytes_sent()
    });
    // One node per rank: (1 + 1) S (2 - 1) / 2 bytes, plus the arguments: leaves, elements and two
    // ends.
    let bytes = 4 * elements as u64 + 4 * 8;
    assert_eq!(counts, [bytes, bytes]);
}

#[test]
fn all_gather_returns_every_payload_by_rank() {
    for ranks in 1..=4 {
        let payload = |rank: usize| vec![rank as u8; rank * MAX_GATHER_BYTES / 3];
        let expected: Vec<Vec<u8>> = (0..ranks).map(payload).collect();
        for result in
            on_ranks(ranks, TEST_TIMEOUT, |mut group| group.all_gather(&payload(group.rank())).unwrap())
        {
            assert!(result == expected, "{ranks} ranks");
        }
    }
}

#[test]
fn broadcast_replaces_the_data_of_all_ranks() {
    for (ranks, root, len) in [(1, 0, 9), (2, 1, 0), (3, 1, 5_000_003), (4, 3, 1 << 20)] {
        let data: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let results = on_ranks(ranks, TEST_TIMEOUT, |mut group| {
            let mut mine = if group.rank() == root { data.clone() } else { vec![1; 7] };
            group.broadcast(root, &mut mine).unwrap();
            mine
        });
        assert!(results.iter().all(|result| *result == data), "{ranks} ranks, root {root}, {len} bytes");
    }
}

#[test]
fn barrier_waits_for_all_ranks() {
    let arrived = std::sync::atomic::AtomicUsize::new(0);
    on_ranks(4, TEST_TIMEOUT, |mut group| {
        arrived.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        group.barrier().unwrap();
        assert_eq!(arrived.load(std::sync::atomic::Ordering::SeqCst), 4);
    });
}

#[test]
fn a_group_of_one_needs_no_network() {
    let mut group = Group::single();
    assert_eq!((group.rank(), group.world_size()), (0, 1));
    assert_eq!(group.all_gather(b"x").unwrap(), [b"x"]);
    let sum = all_reduce(&mut group, 5, &[0..5], 100).unwrap();
    assert_eq!(bits(&sum), bits(&serial_sum(5, 100)));
    group.barrier().unwrap();
    assert_eq!(group.bytes_sent(), 0);

    let (mut spec, _) = specs(1, TEST_TIMEOUT).remove(0);
    spec.peers = vec!["no.such.host:1".into()];
    Group::form(&spec, None, CancelToken::new()).unwrap().barrier().unwrap();
}

#[test]
fn invalid_arguments_are_refused_and_poison_the_group() {
    let cases: [(&[Range<usize>], &str); 4] = [
        (&[0..2, 2..4], "2 ranges for 1 ranks"),
        (&[0..0], "not an ordered cover"),
        (&[0..5], "not a part of 4 leaves"),
        (&[1..4], "not an ordered cover"),
    ];
    for (ranges, expected) in cases {
        let mut group = Group::single();
        let error = group.all_reduce_tree(4, ranges, &[], &mut [0.0]).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(matches!(group.barrier(), Err(CollectiveError::Poisoned)));
    }
    let error = Group::single().all_reduce_tree(4, &[0..4], &[], &mut [0.0]).unwrap_err();
    assert!(error.to_string().contains("not those of rank 0's leaves"), "{error}");
    let error = Group::single().all_gather(&vec![0; MAX_GATHER_BYTES + 1]).unwrap_err();
    assert!(error.to_string().contains("the limit is 1048576"), "{error}");
    let error = Group::single().broadcast(1, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("root 1 in a group of 1 ranks"), "{error}");
}
