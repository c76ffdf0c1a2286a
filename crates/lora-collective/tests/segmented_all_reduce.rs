//! The all-reduce between devices over a fake transport: ranks are threads, devices are memory of
//! the host, and parts are sent through channels.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]
#![expect(clippy::single_range_in_vec_init, reason = "the ranges of a group of one")]

mod leaves;

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::Duration;

use leaves::{nodes_of, serial_sum};
use lora_collective::CollectiveError;
use lora_collective::segmented_all_reduce::{PeerBuffer, SegmentPlan, Transport};
use lora_collective::tree::{NodeId, combine, partition};
use lora_test_kit::numbers::bits;

/// The time limit of a wait for a part.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Memory of a fake device.
struct HostBuffer(Vec<f32>);

impl HostBuffer {
    fn new(elements: usize) -> Self {
        Self(vec![f32::NAN; elements])
    }

    fn address(&mut self) -> u64 {
        self.0.as_mut_ptr() as u64
    }

    fn bytes(&self) -> Range<u64> {
        let start = self.0.as_ptr() as u64;
        start..start + size_of_val(&self.0[..]) as u64
    }
}

/// The fake device of one rank.
struct FakeDevice {
    to: Vec<SyncSender<Vec<f32>>>,
    from: Vec<Receiver<Vec<f32>>>,
    /// The address ranges that may be read and written.
    memory: Vec<Range<u64>>,
}

impl FakeDevice {
    /// Creates the connected devices of all ranks.
    fn all(world_size: usize) -> Vec<Self> {
        let mut hosts: Vec<Self> =
            (0..world_size).map(|_| Self { to: Vec::new(), from: Vec::new(), memory: Vec::new() }).collect();
        for from in 0..world_size {
            for to in 0..world_size {
                let (sender, receiver) = sync_channel(1000);
                hosts[from].to.push(sender);
                hosts[to].from.push(receiver);
            }
        }
        hosts
    }

    fn slice(&self, address: u64, elements: usize) -> &'static mut [f32] {
        let end = address + 4 * elements as u64;
        let inside = |memory: &Range<u64>| memory.start <= address && end <= memory.end;
        assert!(elements > 0 && self.memory.iter().any(inside), "{elements} elements are outside of memory");
        // SAFETY: the range is inside a vector that outlives the all-reduce, and only this thread
        // has the vector.
        unsafe { std::slice::from_raw_parts_mut(address as *mut f32, elements) }
    }
}

impl Transport for FakeDevice {
    type Error = CollectiveError;

    fn exchange(&mut self, sends: &[PeerBuffer], receives: &[PeerBuffer]) -> Result<(), CollectiveError> {
        assert!(!sends.is_empty() || !receives.is_empty(), "an empty call");
        for part in sends {
            self.to[part.peer].send(self.slice(part.address, part.elements).to_vec()).unwrap();
        }
        for part in receives {
            let received = self.from[part.peer].recv_timeout(RECEIVE_TIMEOUT).unwrap();
            self.slice(part.address, part.elements).copy_from_slice(&received);
        }
        Ok(())
    }

    fn copy(&mut self, from: u64, to: u64, elements: usize) -> Result<(), CollectiveError> {
        let from = self.slice(from, elements).to_vec();
        self.slice(to, elements).copy_from_slice(&from);
        Ok(())
    }

    fn combine(
        &mut self,
        order: &[(usize, usize)],
        vectors: u64,
        elements: usize,
    ) -> Result<(), CollectiveError> {
        assert!(!order.is_empty(), "an empty call");
        combine(order, self.slice(vectors, (order.len() + 1) * elements), elements);
        Ok(())
    }
}

/// Sums the segments of vectors on one rank, one segment after the other, and returns the sum.
fn on_device(
    mut host: FakeDevice,
    rank: usize,
    leaves: usize,
    ranges: &[Range<usize>],
    segments: &[usize],
) -> Vec<f32> {
    let elements = segments.iter().sum();
    let mut nodes: Vec<(NodeId, HostBuffer)> = nodes_of(leaves, ranges[rank].clone(), elements)
        .into_iter()
        .map(|(id, vector)| (id, HostBuffer(vector)))
        .collect();
    let mut out = HostBuffer::new(elements);
    let mut start = 0;
    for &len in segments {
        let plan = SegmentPlan::new(leaves, ranges, rank, len).unwrap();
        let mut scratch = HostBuffer::new(plan.scratch_elements());
        host.memory = nodes.iter().map(|(_, vector)| vector.bytes()).collect();
        host.memory.extend([scratch.bytes(), out.bytes()]);
        let at = |memory: &mut HostBuffer| memory.address() + 4 * start as u64;
        let addresses: Vec<(NodeId, u64)> = nodes.iter_mut().map(|(id, vector)| (*id, at(vector))).collect();
        plan.all_reduce(&mut host, &addresses, scratch.address(), at(&mut out)).unwrap();
        start += len;
    }
    // A disconnected channel has delivered all parts, so a part that is left was never received.
    drop(host.to);
    for from in &host.from {
        match from.recv_timeout(RECEIVE_TIMEOUT) {
            Ok(part) => panic!("a part of {} elements was not received", part.len()),
            Err(_) => assert_eq!(from.try_recv(), Err(TryRecvError::Disconnected)),
        }
    }
    out.0
}

fn assert_on_devices(leaves: usize, ranges: &[Range<usize>], segments: &[usize]) {
    let expected = bits(&serial_sum(leaves, segments.iter().sum()));
    thread::scope(|scope| {
        let ranks: Vec<_> = FakeDevice::all(ranges.len())
            .into_iter()
            .enumerate()
            .map(|(rank, host)| scope.spawn(move || on_device(host, rank, leaves, ranges, segments)))
            .collect();
        for (rank, result) in ranks.into_iter().enumerate() {
            let sum = bits(&result.join().unwrap());
            assert!(sum == expected, "rank {rank} of {ranges:?} with {segments:?}");
        }
    });
}

#[test]
fn device_sums_match_the_serial_tree_on_any_number_of_ranks() {
    for ranks in 1..=4 {
        for leaves in [1, 4, 7, 32] {
            assert_on_devices(leaves, &partition(leaves, ranks).unwrap(), &[1001]);
        }
    }
}

#[test]
fn uneven_and_empty_ranges_and_short_segments_are_summed() {
    let segments = [0, 1, 2, 3, 5, 16, 17, 0, 64, 999];
    assert_on_devices(13, &[0..13], &segments);
    assert_on_devices(13, &[0..1, 1..8, 8..11, 11..13], &segments);
    assert_on_devices(13, &[0..0, 0..8, 8..8, 8..13], &segments);
    assert_on_devices(2, &[0..1, 1..2, 2..2, 2..2], &segments);
    assert_on_devices(5, &[0..0, 0..0, 0..5], &segments);
}

#[test]
fn the_output_may_alias_a_node() {
    let (leaves, ranges, elements) = (7, [0..3, 3..7], 101);
    let expected = bits(&serial_sum(leaves, elements));
    thread::scope(|scope| {
        for (rank, mut host) in FakeDevice::all(2).into_iter().enumerate() {
            let (ranges, expected) = (&ranges, &expected);
            scope.spawn(move || {
                let mut nodes = nodes_of(leaves, ranges[rank].clone(), elements);
                let plan = SegmentPlan::new(leaves, ranges, rank, elements).unwrap();
                let mut scratch = HostBuffer::new(plan.scratch_elements());
                let mut addresses = Vec::new();
                for (id, vector) in &mut nodes {
                    let memory = vector.as_mut_ptr() as u64;
                    addresses.push((*id, memory));
                    host.memory.push(memory..memory + 4 * elements as u64);
                }
                host.memory.push(scratch.bytes());
                plan.all_reduce(&mut host, &addresses, scratch.address(), addresses[0].1).unwrap();
                assert!(bits(&nodes[0].1) == *expected, "rank {rank}");
            });
        }
    });
}

#[test]
fn segment_traffic_matches_the_formula() {
    struct Count(usize);
    impl Transport for Count {
        type Error = CollectiveError;
        fn exchange(&mut self, sends: &[PeerBuffer], _: &[PeerBuffer]) -> Result<(), CollectiveError> {
            self.0 += sends.iter().map(|part| part.elements).sum::<usize>();
            Ok(())
        }
        fn copy(&mut self, _: u64, _: u64, _: usize) -> Result<(), CollectiveError> {
            Ok(())
        }
        fn combine(&mut self, _: &[(usize, usize)], _: u64, _: usize) -> Result<(), CollectiveError> {
            Ok(())
        }
    }
    let (leaves, elements) = (32, 9000);
    let ranges = partition(leaves, 3).unwrap();
    // The ranges of 12, 12 and 8 leaves have 2, 2 and 1 nodes.
    for (rank, p) in [2, 2, 1].into_iter().enumerate() {
        let plan = SegmentPlan::new(leaves, &ranges, rank, elements).unwrap();
        let ids = nodes_of(leaves, ranges[rank].clone(), 1);
        let nodes: Vec<(NodeId, u64)> = ids.iter().map(|(id, _)| (*id, 0)).collect();
        let mut sent = Count(0);
        plan.all_reduce(&mut sent, &nodes, 0, 0).unwrap();
        assert_eq!(sent.0, (p + 1) * elements * 2 / 3);
    }
}

#[test]
fn invalid_arguments_are_rejected() {
    let wrong =
        |ranges: &[Range<usize>], rank| SegmentPlan::new(4, ranges, rank, 9).err().unwrap().to_string();
    assert!(wrong(&[0..4], 1).contains("rank 1 with 1 ranges"));
    assert!(wrong(&[0..3], 0).contains("not an ordered cover of 4 leaves"));
    assert!(wrong(&[0..5], 0).contains("not a part of 4 leaves"));
    let plan = SegmentPlan::new(4, &[0..2, 2..4], 0, 9).unwrap();
    let mut host = FakeDevice::all(2).remove(0);
    let error = plan.all_reduce(&mut host, &[(NodeId { level: 1, index: 1 }, 0)], 0, 0).unwrap_err();
    assert!(error.to_string().contains("not those of rank 0's leaves"), "{error}");
}
