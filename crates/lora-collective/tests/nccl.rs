//! The all-reduce over NCCL, and its errors if a peer fails. The ranks are threads that share one
//! GPU, which requires NCCL 2.30 and `NCCL_MULTI_RANK_GPU_ENABLE=1`, or the simulated GPU.

#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod common;
mod leaves;

use std::ops::Range;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use common::{TEST_TIMEOUT, on_ranks};
use leaves::{nodes_of, serial_sum};
use lora_collective::backend_choice::{Collective, CollectiveBackend, Preference};
use lora_collective::tree::{NodeId, nodes_in, partition};
use lora_collective::{CollectiveError, Group, NcclGroup, Operation, PeerFailure};
use lora_ops::device::gpu_address;
use lora_ops::transfer;
use lora_test_kit::numbers::bits;

/// Far longer than a failure takes to be reported, and far shorter than [`TEST_TIMEOUT`].
const PROMPT_LIMIT: Duration = Duration::from_secs(20);
/// The timeout of tests that wait until it expires.
const SHORT_TIMEOUT: Duration = Duration::from_secs(2);

/// The GPU that all ranks share.
const GPU: usize = 0;

fn device() -> Device {
    lora_ops::cuda::open(GPU).unwrap()
}

/// Returns the results of `body` on each rank. Each rank has a group and an NCCL group, whose waits
/// are limited to `timeout`. The result is empty if ranks cannot share a GPU on this machine.
fn on_gpu<T: Send>(
    world_size: usize,
    timeout: Duration,
    body: impl Fn(Group, NcclGroup) -> T + Sync,
) -> Vec<T> {
    let formed = |mut group: Group| {
        let nccl = NcclGroup::form(&mut group, GPU, TEST_TIMEOUT).unwrap();
        // A rank that is connected early must not fail while the others are still connecting.
        group.barrier().unwrap();
        body(group, nccl)
    };
    if is_possible() { on_ranks(world_size, timeout, formed) } else { Vec::new() }
}

fn is_possible() -> bool {
    let agreed = agreed_choice(Preference::default());
    let is_possible = agreed == CollectiveBackend::Nccl;
    if !is_possible {
        eprintln!(
            "skipped: ranks cannot share a GPU on this machine; this requires NCCL 2.30 and \
             NCCL_MULTI_RANK_GPU_ENABLE=1"
        );
    }
    is_possible
}

/// Returns the agreed choice of two ranks that share a GPU and have the same preference.
fn agreed_choice(preference: Preference) -> CollectiveBackend {
    let agreed = on_ranks(2, TEST_TIMEOUT, |mut group| {
        NcclGroup::agree(&mut group, &preference, Some("GPU")).unwrap()
    });
    assert_eq!(agreed[0], agreed[1]);
    agreed[0].clone()
}

/// A rank's nodes and the tensor for the sum, in the GPU's memory.
type Vectors = (Vec<(NodeId, Tensor)>, Tensor);

/// Enqueues the sum over all leaves by segments. The vectors must live until the sum is finished.
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
        let at = |tensor| gpu_address(tensor).unwrap() + 4 * start as u64;
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
    let results = on_gpu(ranges.len(), TEST_TIMEOUT, |mut group, mut nccl| {
        let first = sum(&mut group, &mut nccl, leaves, ranges, segments).unwrap();
        let second = sum(&mut group, &mut nccl, leaves, ranges, segments).unwrap();
        [first, second]
    });
    for (rank, sums) in results.iter().enumerate() {
        assert!(sums.iter().all(|sum| bits(sum) == expected), "rank {rank} of {ranges:?} with {segments:?}");
    }
}

#[test]
fn nccl_sums_match_the_serial_tree() {
    for ranks in 1..=4 {
        assert_sum(32, &partition(32, ranks).unwrap(), &[70_001, 3, 0, 4096]);
    }
}

#[test]
fn nccl_sums_uneven_and_empty_ranges_and_many_segments() {
    assert_sum(13, &[0..1, 1..8, 8..8, 8..13], &[33; 200]);
}

/// Returns the error of `body` and checks that it came within [`PROMPT_LIMIT`].
fn prompt_error<T>(body: impl FnOnce() -> Result<T, CollectiveError>) -> CollectiveError {
    let start = Instant::now();
    let error = body().err().unwrap();
    assert!(start.elapsed() < PROMPT_LIMIT, "took {:?}", start.elapsed());
    error
}

fn names_rank(error: &CollectiveError, rank: usize) -> bool {
    let CollectiveError::Peer { operation: Operation::Device, .. } = error else { return false };
    error.suspects() == [rank]
}

#[test]
fn a_peer_dying_during_connect_is_reported() {
    if !is_possible() {
        return;
    }
    let errors = on_ranks(3, TEST_TIMEOUT, |mut group| match group.rank() {
        // This rank receives NCCL's id and leaves.
        2 => group.broadcast(0, &mut Vec::new()).err(),
        _ => Some(prompt_error(|| NcclGroup::form(&mut group, GPU, TEST_TIMEOUT))),
    });
    assert!(errors[2].is_none());
    for error in errors.iter().flatten() {
        assert!(names_rank(error, 2), "{error}");
    }
}

#[test]
fn a_peer_that_does_not_connect_is_reported_within_the_timeout() {
    if !is_possible() {
        return;
    }
    let done = Barrier::new(3);
    let errors = on_ranks(3, SHORT_TIMEOUT, |mut group| {
        let hangs = group.rank() == 2;
        if hangs {
            group.broadcast(0, &mut Vec::new()).unwrap();
        }
        let error = (!hangs).then(|| prompt_error(|| NcclGroup::form(&mut group, GPU, SHORT_TIMEOUT)));
        done.wait();
        error
    });
    for error in errors.iter().flatten() {
        assert_eq!(error.suspects(), [2], "{error}");
    }
}

#[test]
fn nccl_is_not_retried_after_a_failure() {
    let nccl_failure = Some("no route".to_owned());
    let automatic = Preference { nccl_failure: nccl_failure.clone(), ..Preference::default() };
    assert_ne!(agreed_choice(automatic), CollectiveBackend::Nccl);
    // The error names this obstacle, not the shared GPU.
    let demanding = Preference { nccl_failure, collective: Collective::Nccl };
    let refused = on_ranks(2, TEST_TIMEOUT, |mut group| {
        NcclGroup::agree(&mut group, &demanding, Some("GPU")).unwrap_err()
    });
    for error in refused {
        let text = "rank 0 requires the collective nccl, but rank 0 cannot use NCCL: it failed when an \
                    earlier group formed (no route); a new worker process tries again";
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn a_peer_dying_before_its_send_is_reported() {
    let errors = on_gpu(3, TEST_TIMEOUT, |mut group, mut nccl| match group.rank() {
        2 => None,
        _ => {
            let error = prompt_error(|| sum(&mut group, &mut nccl, 3, &[0..1, 1..2, 2..3], &[50_000]));
            assert!(matches!(nccl.finish(&mut group), Err(CollectiveError::Poisoned)));
            assert!(matches!(group.barrier(), Err(CollectiveError::Poisoned)));
            let start = Instant::now();
            drop(nccl);
            assert!(start.elapsed() < PROMPT_LIMIT, "took {:?} to abort", start.elapsed());
            Some(error)
        }
    });
    for error in errors.iter().flatten() {
        assert!(names_rank(error, 2), "{error}");
    }
}

#[test]
fn cancel_ends_a_wait_and_notifies_the_peers() {
    let cancelled = Barrier::new(2);
    let errors = on_gpu(2, TEST_TIMEOUT, |mut group, mut nccl| {
        let token = group.cancel_token().clone();
        thread::scope(|scope| match group.rank() {
            0 => {
                let vectors = start_sum(&mut group, &mut nccl, 2, &[0..1, 1..2], &[1000, 1000]);
                scope.spawn(move || token.cancel());
                let error = prompt_error(|| vectors.and_then(|_| nccl.finish(&mut group)));
                cancelled.wait();
                error
            }
            _ => {
                cancelled.wait();
                prompt_error(|| group.check().and_then(|()| group.barrier()))
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
fn a_hanging_peer_is_reported_within_the_timeout() {
    let done = Barrier::new(3);
    let errors = on_gpu(3, SHORT_TIMEOUT, |mut group, mut nccl| {
        let hangs = group.rank() == 2;
        let error =
            (!hangs).then(|| prompt_error(|| sum(&mut group, &mut nccl, 3, &[0..1, 1..2, 2..3], &[1000])));
        done.wait();
        error
    });
    for error in errors.iter().flatten() {
        assert_eq!(error.suspects(), [2], "{error}");
    }
}

/// All data seems to have arrived, but an aborted kernel may have ended as if it had.
#[test]
fn data_of_a_rank_that_left_is_not_used() {
    let [started, left] = [Barrier::new(2), Barrier::new(2)];
    let errors = on_gpu(2, TEST_TIMEOUT, |mut group, mut nccl| {
        let vectors = start_sum(&mut group, &mut nccl, 2, &[0..1, 1..2], &[1000]);
        started.wait();
        if group.rank() == 1 {
            // Both have sent and received everything.
            lora_ops::cuda::stream(&device()).unwrap().context().synchronize().unwrap();
            drop((group, nccl, vectors));
            left.wait();
            return None;
        }
        left.wait();
        Some(prompt_error(|| vectors.and_then(|_| nccl.finish(&mut group))))
    });
    for error in errors.iter().flatten() {
        assert_eq!(error.suspects(), [1], "{error}");
    }
}

#[test]
fn a_device_timeout_blames_no_peer() {
    let done = Barrier::new(2);
    let errors = on_gpu(2, SHORT_TIMEOUT, |mut group, mut nccl| {
        let error = match group.rank() {
            0 => Some(prompt_error(|| sum(&mut group, &mut nccl, 2, &[0..1, 1..2], &[1000]))),
            _ => {
                // Simulates a rank that waited almost as long for its own GPU.
                thread::sleep(SHORT_TIMEOUT * 3 / 4);
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
fn invalid_nodes_are_rejected_and_the_peers_notified() {
    let errors = on_gpu(2, TEST_TIMEOUT, |mut group, mut nccl| match group.rank() {
        0 => {
            let node = nodes_in(2, &(1..2)).unwrap()[0];
            prompt_error(|| nccl.all_reduce(&mut group, 2, &[0..1, 1..2], &[(node, 0)], 0, 10))
        }
        _ => prompt_error(|| sum(&mut group, &mut nccl, 2, &[0..1, 1..2], &[10])),
    });
    if let [first, second] = &errors[..] {
        assert!(matches!(first, CollectiveError::Argument(_)), "{first}");
        assert!(names_rank(second, 0), "{second}");
    }
}
