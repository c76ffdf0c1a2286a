//! The all-reduce between devices over a stand-in: ranks are threads, devices are memory of the host, and parts travel
//! through channels. And the choice between NCCL and TCP.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]
#![expect(clippy::single_range_in_vec_init, reason = "the ranges of a group of one")]

mod common;
mod leaves;

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::Duration;

use common::{PATIENT, on_ranks};
use leaves::{bits, nodes_of, serial_sum};
use lora_collective::CollectiveError;
use lora_collective::device::{Choice, Collective, Fabric, Offer, Part, SegmentPlan, agree, choose};
use lora_collective::tree::{NodeId, combine, partition};

/// What waits for a part.
const LIMIT: Duration = Duration::from_secs(20);

/// Memory of a device.
struct Memory(Vec<f32>);

impl Memory {
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

/// One rank's end.
struct Host {
    to: Vec<SyncSender<Vec<f32>>>,
    from: Vec<Receiver<Vec<f32>>>,
    /// What may be read and written.
    memory: Vec<Range<u64>>,
}

impl Host {
    /// The ends of all ranks.
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
        assert!(elements > 0 && self.memory.iter().any(inside), "{elements} elements outside of all memory");
        // SAFETY: it is inside a vector that outlives the all-reduce, and only this thread has that.
        unsafe { std::slice::from_raw_parts_mut(address as *mut f32, elements) }
    }
}

impl Fabric for Host {
    type Error = CollectiveError;

    fn exchange(&mut self, sends: &[Part], receives: &[Part]) -> Result<(), CollectiveError> {
        assert!(!sends.is_empty() || !receives.is_empty(), "a call for nothing");
        for part in sends {
            self.to[part.peer].send(self.slice(part.address, part.elements).to_vec()).unwrap();
        }
        for part in receives {
            let received = self.from[part.peer].recv_timeout(LIMIT).unwrap();
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
        assert!(!order.is_empty(), "a call for nothing");
        combine(order, self.slice(vectors, (order.len() + 1) * elements), elements);
        Ok(())
    }
}

/// A rank's part in summing vectors of `segments` in turn; returns the sum.
fn on_device(
    mut host: Host,
    rank: usize,
    leaves: usize,
    ranges: &[Range<usize>],
    segments: &[usize],
) -> Vec<f32> {
    let elements = segments.iter().sum();
    let mut nodes: Vec<(NodeId, Memory)> = nodes_of(leaves, ranges[rank].clone(), elements)
        .into_iter()
        .map(|(id, vector)| (id, Memory(vector)))
        .collect();
    let mut out = Memory::new(elements);
    let mut start = 0;
    for &len in segments {
        let plan = SegmentPlan::new(leaves, ranges, rank, len).unwrap();
        let mut scratch = Memory::new(plan.scratch_elements());
        host.memory = nodes.iter().map(|(_, vector)| vector.bytes()).collect();
        host.memory.extend([scratch.bytes(), out.bytes()]);
        let at = |memory: &mut Memory| memory.address() + 4 * start as u64;
        let addresses: Vec<(NodeId, u64)> = nodes.iter_mut().map(|(id, vector)| (*id, at(vector))).collect();
        plan.all_reduce(&mut host, &addresses, scratch.address(), at(&mut out)).unwrap();
        start += len;
    }
    // Sent is everything before a sender goes, so what is left over now was never received.
    drop(host.to);
    for from in &host.from {
        match from.recv_timeout(LIMIT) {
            Ok(part) => panic!("nobody received a part of {} elements", part.len()),
            Err(_) => assert_eq!(from.try_recv(), Err(TryRecvError::Disconnected)),
        }
    }
    out.0
}

fn assert_on_devices(leaves: usize, ranges: &[Range<usize>], segments: &[usize]) {
    let expected = bits(&serial_sum(leaves, segments.iter().sum()));
    thread::scope(|scope| {
        let ranks: Vec<_> = Host::all(ranges.len())
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
fn devices_have_the_bits_of_the_serial_tree_on_any_number_of_ranks() {
    for ranks in 1..=4 {
        for leaves in [1, 4, 7, 32] {
            assert_on_devices(leaves, &partition(leaves, ranks).unwrap(), &[1001]);
        }
    }
}

#[test]
fn devices_take_uneven_and_empty_ranges_and_segments_shorter_than_the_group() {
    let segments = [0, 1, 2, 3, 5, 16, 17, 0, 64, 999];
    assert_on_devices(13, &[0..13], &segments);
    assert_on_devices(13, &[0..1, 1..8, 8..11, 11..13], &segments);
    assert_on_devices(13, &[0..0, 0..8, 8..8, 8..13], &segments);
    assert_on_devices(2, &[0..1, 1..2, 2..2, 2..2], &segments);
    assert_on_devices(5, &[0..0, 0..0, 0..5], &segments);
}

#[test]
fn a_sum_may_take_the_place_of_a_node() {
    let (leaves, ranges, elements) = (7, [0..3, 3..7], 101);
    let expected = bits(&serial_sum(leaves, elements));
    thread::scope(|scope| {
        for (rank, mut host) in Host::all(2).into_iter().enumerate() {
            let (ranges, expected) = (&ranges, &expected);
            scope.spawn(move || {
                let mut nodes = nodes_of(leaves, ranges[rank].clone(), elements);
                let plan = SegmentPlan::new(leaves, ranges, rank, elements).unwrap();
                let mut scratch = Memory::new(plan.scratch_elements());
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
fn a_segment_costs_the_traffic_of_the_nodes_and_the_sums() {
    struct Count(usize);
    impl Fabric for Count {
        type Error = CollectiveError;
        fn exchange(&mut self, sends: &[Part], _: &[Part]) -> Result<(), CollectiveError> {
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
    // 12, 12 and 8 leaves are 2, 2 and 1 nodes.
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
fn arguments_that_make_no_plan_are_refused() {
    let wrong =
        |ranges: &[Range<usize>], rank| SegmentPlan::new(4, ranges, rank, 9).err().unwrap().to_string();
    assert!(wrong(&[0..4], 1).contains("rank 1 with 1 ranges"));
    assert!(wrong(&[0..3], 0).contains("not an ordered cover of 4 leaves"));
    assert!(wrong(&[0..5], 0).contains("not a part of 4 leaves"));
    let plan = SegmentPlan::new(4, &[0..2, 2..4], 0, 9).unwrap();
    let mut host = Host::all(2).remove(0);
    let error = plan.all_reduce(&mut host, &[(NodeId { level: 1, index: 1 }, 0)], 0, 0).unwrap_err();
    assert!(error.to_string().contains("not those of rank 0's leaves"), "{error}");
}

fn offers(gpus: &[&str]) -> Vec<Offer> {
    let offer = |gpu: &&str| Offer {
        wanted: Collective::Auto,
        nccl: Ok(22_809),
        gpu: (*gpu).to_owned(),
        host_id: None,
        shares_gpu: false,
        gpus: 1,
    };
    gpus.iter().map(offer).collect()
}

/// What is chosen for `offers`, and what where rank 1 demands NCCL.
fn choices(mut offers: Vec<Offer>) -> (Choice, Result<Choice, String>) {
    let chosen = choose(&offers).unwrap();
    offers[1].wanted = Collective::Nccl;
    (chosen, choose(&offers))
}

fn change(mut offers: Vec<Offer>, change: impl Fn(&mut [Offer])) -> Vec<Offer> {
    change(&mut offers);
    offers
}

/// As [`shared_gpu_variables`](lora_collective::device::shared_gpu_variables) sets it.
fn own_host_ids(offers: &mut [Offer]) {
    for (index, offer) in offers.iter_mut().enumerate() {
        offer.host_id = Some(format!("shared-gpu-{index}"));
    }
}

#[test]
fn nccl_is_chosen_where_all_ranks_can_use_it() {
    assert_eq!(choices(offers(&["a", "b", "c"])), (Choice::Nccl, Ok(Choice::Nccl)));
    assert_eq!(choose(&offers(&["a"])), Ok(Choice::Nccl));
    let shared = change(offers(&["a", "b", "a"]), |offers| {
        offers.iter_mut().for_each(|it| (it.nccl, it.shares_gpu) = (Ok(23_007), true));
    });
    assert_eq!(choices(shared), (Choice::Nccl, Ok(Choice::Nccl)));
}

#[test]
fn ranks_share_a_gpu_as_different_hosts_with_any_version() {
    for version in [22_100, 22_809, 23_003] {
        let shared = change(offers(&["a", "a", "a"]), |it| {
            own_host_ids(it);
            it.iter_mut().for_each(|it| it.nccl = Ok(version));
        });
        assert_eq!(choices(shared), (Choice::Nccl, Ok(Choice::Nccl)), "NCCL {version}");
    }
    // One that has none is on the host that its name gives.
    let one = change(offers(&["a", "a"]), |it| it[1].host_id = Some("shared-gpu-1".to_owned()));
    assert_eq!(choose(&one), Ok(Choice::Nccl));
    let same = change(offers(&["a", "b", "a"]), |it| {
        it.iter_mut().for_each(|it| it.host_id = Some("node".to_owned()));
        it[0].wanted = Collective::Nccl;
    });
    let error = choose(&same).unwrap_err();
    assert!(error.contains("ranks 0 and 2 share a GPU"), "{error}");
}

/// Offers that cannot use NCCL, and why not.
fn obstacles() -> Vec<(Vec<Offer>, &'static str)> {
    let new = |offers: &mut [Offer]| offers.iter_mut().for_each(|it| it.nccl = Ok(23_000));
    vec![
        (
            change(offers(&["a", "b"]), |it| it[0].wanted = Collective::Tcp),
            "rank 0 has the setting collective = tcp; it must be auto or nccl",
        ),
        (
            change(offers(&["a", "b"]), |it| it[1].nccl = Err("it is broken; mend it".to_owned())),
            "rank 1 cannot use NCCL: it is broken; mend it",
        ),
        (
            change(offers(&["a", "b", "c"]), |it| it[2].nccl = Ok(23_007)),
            "rank 0 has NCCL 2.28.9 and rank 2 has NCCL 2.30.7; all must have the same version",
        ),
        (
            change(offers(&["a", "b", "b"]), |it| it[2].shares_gpu = true),
            "ranks 1 and 2 share a GPU; each process must have its own NCCL_HOSTID (loractl run sets it \
             with --collective nccl), or NCCL_MULTI_RANK_GPU_ENABLE=1 with NCCL 2.30.0 or newer (it is \
             2.28.9)",
        ),
        (
            change(offers(&["a", "b", "a"]), new),
            "ranks 0 and 2 share a GPU; each process must have its own NCCL_HOSTID (loractl run sets it \
             with --collective nccl), or NCCL_MULTI_RANK_GPU_ENABLE=1 (rank 0 does not have it)",
        ),
        (
            change(offers(&["a", "b", "a"]), |it| {
                new(it);
                it[0].shares_gpu = true;
            }),
            "ranks 0 and 2 share a GPU; each process must have its own NCCL_HOSTID (loractl run sets it \
             with --collective nccl), or NCCL_MULTI_RANK_GPU_ENABLE=1 (rank 1 does not have it)",
        ),
    ]
}

#[test]
fn tcp_between_several_gpus_is_a_fallback_that_names_what_would_be_right() {
    for (offers, obstacle) in obstacles() {
        let text =
            format!("gradients travel between the GPUs over TCP, which is slower than NCCL: {obstacle}");
        let demanded = format!("rank 1 demands the collective nccl, but {obstacle}");
        assert_eq!(choices(offers), (Choice::Fallback(text), Err(demanded)));
    }
}

#[test]
fn tcp_is_no_fallback_on_the_only_gpu_or_where_it_is_the_setting_of_all_ranks() {
    let on_one_gpu =
        |offers: Vec<Offer>| change(offers, |it| it.iter_mut().for_each(|it| it.gpu = "a".to_owned()));
    for (offers, obstacle) in obstacles() {
        assert_eq!(choose(&on_one_gpu(offers)), Ok(Choice::Tcp), "{obstacle}");
    }
    let configured = change(offers(&["a", "b"]), |it| {
        it.iter_mut().for_each(|it| it.wanted = Collective::Tcp);
    });
    assert_eq!(choose(&configured), Ok(Choice::Tcp));
    // They share a GPU on a machine that has others.
    let crowded = change(offers(&["a", "a"]), |it| it.iter_mut().for_each(|it| it.gpus = 4));
    assert!(matches!(choose(&crowded), Ok(Choice::Fallback(_))));
}

#[test]
fn ranks_agree_on_the_choice() {
    let choice = |wanted: fn(usize) -> Collective| {
        on_ranks(3, PATIENT, |mut group| {
            let rank = group.rank();
            let offer = Offer { wanted: wanted(rank), ..offers(&["a", "b", "c"])[rank].clone() };
            let agreed = agree(&mut group, &offer);
            group.barrier().unwrap();
            agreed
        })
    };
    assert!(choice(|_| Collective::Auto).into_iter().all(|agreed| agreed.unwrap() == Choice::Nccl));
    let one_tcp = choice(|rank| [Collective::Auto, Collective::Tcp, Collective::Auto][rank]);
    let one_tcp: Vec<Choice> = one_tcp.into_iter().map(Result::unwrap).collect();
    assert!(matches!(&one_tcp[0], Choice::Fallback(text) if text.contains("rank 1")), "{one_tcp:?}");
    assert!(one_tcp.iter().all(|choice| *choice == one_tcp[0]), "{one_tcp:?}");
    for agreed in choice(|rank| [Collective::Nccl, Collective::Auto, Collective::Tcp][rank]) {
        let error = agreed.unwrap_err();
        assert!(matches!(error, CollectiveError::NoNccl(_)), "{error}");
        let expected = "rank 0 demands the collective nccl, but rank 2 has the setting collective = tcp; \
                        it must be auto or nccl";
        assert_eq!(error.to_string(), expected);
        assert!(error.suspects().is_empty());
    }
}

#[test]
fn an_offer_that_is_none_is_blamed_on_its_rank() {
    let errors = on_ranks(2, PATIENT, |mut group| {
        let offer = &offers(&["a"])[0];
        match group.rank() {
            0 => agree(&mut group, offer).unwrap_err(),
            _ => group.all_gather(b"hm").and_then(|_| group.barrier()).unwrap_err(),
        }
    });
    assert!(errors[0].to_string().contains("rank 1 sent a malformed frame: no offer"), "{}", errors[0]);
    assert_eq!((errors[0].suspects(), errors[1].suspects()), (vec![1], vec![1]));
}

#[test]
fn a_collective_has_one_name() {
    for (text, collective) in
        [("auto", Collective::Auto), ("nccl", Collective::Nccl), ("tcp", Collective::Tcp)]
    {
        assert_eq!(text.parse(), Ok(collective));
        assert_eq!(collective.to_string(), text);
    }
    let error = "mpi".parse::<Collective>().unwrap_err();
    assert_eq!(error.to_string(), "no collective is called `mpi`: it is auto, nccl or tcp");
}
