//! The all-reduce over NCCL, and how it ends where a peer fails: ranks are threads that share one GPU, which takes NCCL
//! 2.30 and `NCCL_MULTI_RANK_GPU_ENABLE=1`, or the simulated GPU.

#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod common;
mod leaves;

use std::ops::Range;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use common::{PATIENT, on_ranks};
use cudarc::driver::CudaStream;
use leaves::{bits, nodes_of, serial_sum};
use lora_collective::device::{Choice, Collective, Preference};
use lora_collective::tree::{NodeId, nodes_in, partition};
use lora_collective::{CollectiveError, Group, NcclGroup, Operation, PeerFailure};
use lora_ops::cuda::address;
use lora_ops::transfer;

/// Far above what giving up takes, far below [`PATIENT`].
const SOON: Duration = Duration::from_secs(20);
/// For tests that wait for it to pass.
const BRIEF: Duration = Duration::from_secs(2);

fn device() -> Device {
    lora_ops::cuda::open(0).unwrap()
}

fn compute() -> Arc<CudaStream> {
    lora_ops::cuda::stream(&device()).unwrap().unwrap()
}

/// What `body` returns on each rank, each with a group and one of NCCL, and the limit of their waits; nothing where this machine
/// has no such thing.
fn on_gpu<T: Send>(
    world_size: usize,
    timeout: Duration,
    body: impl Fn(Group, NcclGroup) -> T + Sync,
) -> Vec<T> {
    let formed = |mut group: Group| {
        let nccl = NcclGroup::form(&mut group, compute(), PATIENT).unwrap();
        // The first to be done may be the first to fail.
        group.barrier().unwrap();
        body(group, nccl)
    };
    if is_possible() { on_ranks(world_size, timeout, formed) } else { Vec::new() }
}

fn is_possible() -> bool {
    let agreed = agreed_choice(Preference::default());
    let is_possible = agreed == Choice::Nccl;
    if !is_possible {
        eprintln!(
            "skipped: ranks cannot share a GPU here; it takes NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1"
        );
    }
    is_possible
}

/// What ranks that share a GPU and all have this preference agree on.
fn agreed_choice(preference: Preference) -> Choice {
    let agreed = on_ranks(2, PATIENT, |mut group| NcclGroup::agree(&mut group, &preference, "GPU").unwrap());
    assert_eq!(agreed[0], agreed[1]);
    agreed[0].clone()
}

/// A rank's nodes and where the sum goes, in memory of the GPU.
type Vectors = (Vec<(NodeId, Tensor)>, Tensor);

/// Enqueues the sum over all leaves, by segments; the vectors must live until it is finished.
fn start_sum(
    group: &mut Group,
    nccl: &mut NcclGroup,
    leaves: usize,
    ranges: &[Range<usize>],
    segments: &[usize],
) -> Result<Vectors, CollectiveError> {
    let elements = segments.iter().sum::<usize>();
    let upload = |values| transfer::from_vec::<f32>(values, elements, &device()).unwrap();
    let nodes: Vec<(NodeId, Tensor)> = nodes_of(leaves, ranges[group.rank()].clone(), elements)
        .into_iter()
        .map(|(id, vector)| (id, upload(vector)))
        .collect();
    let out = upload(vec![f32::NAN; elements]);
    let mut start = 0;
    for &len in segments {
        let at = |tensor| address(tensor).unwrap() + 4 * start as u64;
        let addresses: Vec<(NodeId, u64)> = nodes.iter().map(|(id, vector)| (*id, at(vector))).collect();
        nccl.all_reduce(group, leaves, ranges, &addresses, at(&out), len)?;
        start += len;
    }
    Ok((nodes, out))
}

fn sum(
    group: &mut Group,
    nccl: &mut NcclGroup,
    leaves: usize,
    ranges: &[Range<usize>],
    segments: &[usize],
) -> Result<Vec<f32>, CollectiveError> {
    let vectors = start_sum(group, nccl, leaves, ranges, segments)?;
    nccl.finish(group)?;
    Ok(transfer::to_vec(&vectors.1).unwrap())
}

fn assert_sum(leaves: usize, ranges: &[Range<usize>], segments: &[usize]) {
    let expected = bits(&serial_sum(leaves, segments.iter().sum()));
    let results = on_gpu(ranges.len(), PATIENT, |mut group, mut nccl| {
        let first = sum(&mut group, &mut nccl, leaves, ranges, segments).unwrap();
        let second = sum(&mut group, &mut nccl, leaves, ranges, segments).unwrap();
        [first, second]
    });
    for (rank, sums) in results.iter().enumerate() {
        assert!(sums.iter().all(|sum| bits(sum) == expected), "rank {rank} of {ranges:?} with {segments:?}");
    }
}

#[test]
fn nccl_has_the_bits_of_the_serial_tree() {
    for ranks in 1..=4 {
        assert_sum(32, &partition(32, ranks).unwrap(), &[70_001, 3, 0, 4096]);
    }
}

#[test]
fn nccl_takes_uneven_and_empty_ranges_and_segments_without_end() {
    assert_sum(13, &[0..1, 1..8, 8..8, 8..13], &[33; 200]);
}

/// The error of a rank, and that it came soon.
fn error_soon<T>(body: impl FnOnce() -> Result<T, CollectiveError>) -> CollectiveError {
    let start = Instant::now();
    let error = body().err().unwrap();
    assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
    error
}

fn blames(error: &CollectiveError, rank: usize) -> bool {
    let CollectiveError::Peer { operation: Operation::Device, .. } = error else { return false };
    error.suspects() == [rank]
}

#[test]
fn a_peer_that_dies_while_the_others_connect_is_named() {
    if !is_possible() {
        return;
    }
    let errors = on_ranks(3, PATIENT, |mut group| match group.rank() {
        // It takes NCCL's id with it.
        2 => group.broadcast(0, &mut Vec::new()).err(),
        _ => Some(error_soon(|| NcclGroup::form(&mut group, compute(), PATIENT))),
    });
    assert!(errors[2].is_none());
    for error in errors.iter().flatten() {
        assert!(blames(error, 2), "{error}");
    }
}

#[test]
fn a_peer_that_does_not_connect_is_named_within_the_limit() {
    if !is_possible() {
        return;
    }
    let done = Barrier::new(3);
    let errors = on_ranks(3, BRIEF, |mut group| {
        let hangs = group.rank() == 2;
        if hangs {
            group.broadcast(0, &mut Vec::new()).unwrap();
        }
        let error = (!hangs).then(|| error_soon(|| NcclGroup::form(&mut group, compute(), BRIEF)));
        done.wait();
        error
    });
    for error in errors.iter().flatten() {
        assert_eq!(error.suspects(), [2], "{error}");
    }
}

#[test]
fn nccl_that_failed_before_is_not_tried_again() {
    let nccl_failure = Some("no route".to_owned());
    let automatic = Preference { nccl_failure: nccl_failure.clone(), ..Preference::default() };
    assert_ne!(agreed_choice(automatic), Choice::Nccl);
    // The error names this obstacle, not the shared GPU.
    let demanding = Preference { nccl_failure, collective: Collective::Nccl };
    let refused =
        on_ranks(2, PATIENT, |mut group| NcclGroup::agree(&mut group, &demanding, "GPU").unwrap_err());
    for error in refused {
        let text = "rank 0 demands the collective nccl, but rank 0 cannot use NCCL: it failed when an \
                    earlier group formed (no route); a new worker process tries again";
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn a_peer_that_dies_before_its_part_is_named() {
    let errors = on_gpu(3, PATIENT, |mut group, mut nccl| match group.rank() {
        2 => None,
        _ => {
            let error = error_soon(|| sum(&mut group, &mut nccl, 3, &[0..1, 1..2, 2..3], &[50_000]));
            assert!(matches!(nccl.finish(&mut group), Err(CollectiveError::Poisoned)));
            assert!(matches!(group.barrier(), Err(CollectiveError::Poisoned)));
            let start = Instant::now();
            drop(nccl);
            assert!(start.elapsed() < SOON, "took {:?} to abort", start.elapsed());
            Some(error)
        }
    });
    for error in errors.iter().flatten() {
        assert!(blames(error, 2), "{error}");
    }
}

#[test]
fn a_wait_that_is_cancelled_ends_and_the_peers_are_told() {
    let cancelled = Barrier::new(2);
    let errors = on_gpu(2, PATIENT, |mut group, mut nccl| {
        let token = group.cancel_token().clone();
        thread::scope(|scope| match group.rank() {
            0 => {
                let vectors = start_sum(&mut group, &mut nccl, 2, &[0..1, 1..2], &[1000, 1000]);
                scope.spawn(move || token.cancel());
                let error = error_soon(|| vectors.and_then(|_| nccl.finish(&mut group)));
                cancelled.wait();
                error
            }
            _ => {
                cancelled.wait();
                error_soon(|| group.check().and_then(|()| group.barrier()))
            }
        })
    });
    if let [first, second] = &errors[..] {
        assert!(matches!(first, CollectiveError::Cancelled), "{first}");
        let CollectiveError::Peer { rank: 0, failure: PeerFailure::Left, .. } = second else {
            panic!("{second}")
        };
    }
}

#[test]
fn a_peer_that_hangs_is_named_within_the_limit() {
    let done = Barrier::new(3);
    let errors = on_gpu(3, BRIEF, |mut group, mut nccl| {
        let hangs = group.rank() == 2;
        let error =
            (!hangs).then(|| error_soon(|| sum(&mut group, &mut nccl, 3, &[0..1, 1..2, 2..3], &[1000])));
        done.wait();
        error
    });
    for error in errors.iter().flatten() {
        assert_eq!(error.suspects(), [2], "{error}");
    }
}

/// All has come, but perhaps only as an aborted kernel's last words.
#[test]
fn what_came_from_a_rank_that_left_before_the_end_is_not_used() {
    let [started, left] = [Barrier::new(2), Barrier::new(2)];
    let errors = on_gpu(2, PATIENT, |mut group, mut nccl| {
        let vectors = start_sum(&mut group, &mut nccl, 2, &[0..1, 1..2], &[1000]);
        started.wait();
        if group.rank() == 1 {
            // Both have sent and received everything.
            compute().context().synchronize().unwrap();
            drop((group, nccl, vectors));
            left.wait();
            return None;
        }
        left.wait();
        Some(error_soon(|| vectors.and_then(|_| nccl.finish(&mut group))))
    });
    for error in errors.iter().flatten() {
        assert_eq!(error.suspects(), [1], "{error}");
    }
}

#[test]
fn work_that_is_not_done_though_all_ranks_answer_is_nobodys_fault() {
    let done = Barrier::new(2);
    let errors = on_gpu(2, BRIEF, |mut group, mut nccl| {
        let error = match group.rank() {
            0 => Some(error_soon(|| sum(&mut group, &mut nccl, 2, &[0..1, 1..2], &[1000]))),
            _ => {
                // As if it had waited about as long for a GPU of its own.
                thread::sleep(BRIEF * 3 / 4);
                group.barrier().err()
            }
        };
        done.wait();
        error
    });
    if let [Some(error), None] = &errors[..] {
        assert!(matches!(error, CollectiveError::DeviceTimeout { .. }), "{error}");
        assert!(error.suspects().is_empty());
    } else {
        assert!(errors.is_empty(), "{errors:?}");
    }
}

#[test]
fn wrong_nodes_are_refused_and_the_peers_are_told() {
    let errors = on_gpu(2, PATIENT, |mut group, mut nccl| match group.rank() {
        0 => {
            let node = nodes_in(2, &(1..2)).unwrap()[0];
            error_soon(|| nccl.all_reduce(&mut group, 2, &[0..1, 1..2], &[(node, 0)], 0, 10))
        }
        _ => error_soon(|| sum(&mut group, &mut nccl, 2, &[0..1, 1..2], &[10])),
    });
    if let [first, second] = &errors[..] {
        assert!(matches!(first, CollectiveError::Argument(_)), "{first}");
        assert!(blames(second, 0), "{second}");
    }
}
