//! Peers that die, hang, send invalid data or call another operation. Rank 1 or 2 is often a raw
//! socket that sends the documented handshake and frames, so that it can stop at any byte.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use common::{TEST_TIMEOUT, on_ranks, specs};
use lora_collective::tree::nodes_in;
use lora_collective::{CancelToken, CollectiveError, Group, GroupSpec, Operation, PeerFailure};

/// A change that makes a rank's spec invalid.
type SpecChange = fn(&mut GroupSpec);

/// The timeout of tests that wait until it expires.
const SHORT_TIMEOUT: Duration = Duration::from_secs(1);

/// Returns the connection of a raw peer to rank `to`, after the handshake and the barrier that ends
/// the formation.
fn raw_connection(spec: &GroupSpec, to: usize) -> TcpStream {
    let mut stream = raw_handshake(spec, to);
    stream.write_all(&frame(Operation::Barrier as u8, 0, &[])).unwrap();
    stream
}

fn raw_handshake(spec: &GroupSpec, to: usize) -> TcpStream {
    let mut stream = TcpStream::connect(&spec.peers[to]).unwrap();
    stream.write_all(b"LORAPEER").unwrap();
    let body = 24 + spec.token.len() + spec.job.len();
    let mut numbers = vec![1, body as u32, spec.generation as u32, 0];
    numbers.extend([spec.rank, to, spec.peers.len(), spec.token.len()].map(|n| n as u32));
    numbers.iter().for_each(|number| stream.write_all(&number.to_le_bytes()).unwrap());
    stream.write_all(spec.token.as_bytes()).unwrap();
    stream.write_all(spec.job.as_bytes()).unwrap();
    let mut reply = [0; 9];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"LORAPEER\0");
    stream.write_all(&[1]).unwrap();
    stream
}

fn frame(kind: u8, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&sequence.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn failed_peer(error: &CollectiveError) -> (usize, Operation, &PeerFailure) {
    match error {
        CollectiveError::Peer { rank, operation, failure, .. } => (*rank, *operation, failure),
        other => panic!("no peer is at fault: {other}"),
    }
}

/// Returns rank 0's error in `operation` if rank 1 connects, sends `bytes` and closes its sending
/// side.
fn error_after<T>(
    bytes: &[u8],
    operation: impl FnOnce(&mut Group) -> Result<T, CollectiveError> + Send,
) -> CollectiveError {
    let mut specs = specs(2, TEST_TIMEOUT);
    let (peer, _) = specs.remove(1);
    let (spec, listener) = specs.remove(0);
    thread::scope(|scope| {
        let rank0 = scope.spawn(move || {
            let mut group = Group::form(&spec, Some(&listener), CancelToken::new()).unwrap();
            let error = operation(&mut group).err().expect("the operation must fail");
            assert!(matches!(group.barrier(), Err(CollectiveError::Poisoned)));
            error
        });
        let mut stream = raw_connection(&peer, 0);
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        rank0.join().unwrap()
    })
}

const RANGES: [std::ops::Range<usize>; 2] = [0..1, 1..2];

fn reduce_two(group: &mut Group) -> Result<(), CollectiveError> {
    let id = nodes_in(2, &RANGES[0]).unwrap()[0];
    group.all_reduce_tree(2, &RANGES, &[(id, &[1.0; 1000])], &mut [0.0; 1000])
}

fn arguments(leaves: u64, elements: u64) -> Vec<u8> {
    let numbers = [leaves, elements, 1, 2].map(u64::to_le_bytes);
    frame(Operation::AllReduce as u8, 1, numbers.as_flattened())
}

#[test]
fn a_peer_dying_mid_vector_is_reported() {
    let mut bytes = arguments(2, 1000);
    bytes.extend_from_slice(&frame(Operation::AllReduce as u8, 1, &[0; 2000])[..700]);
    bytes[48 + 4..48 + 8].copy_from_slice(&2000u32.to_le_bytes());
    let error = error_after(&bytes, reduce_two);
    assert!(matches!(failed_peer(&error), (1, Operation::AllReduce, PeerFailure::Closed)), "{error}");
    assert_eq!(error.suspects(), [1]);
}

#[test]
fn mismatched_arguments_are_an_error() {
    for (leaves, elements) in [(3, 1000), (2, 999)] {
        let error = error_after(&arguments(leaves, elements), reduce_two);
        assert!(matches!(failed_peer(&error), (1, Operation::AllReduce, PeerFailure::Arguments)), "{error}");
    }
}

#[test]
fn malformed_frames_are_rejected_before_allocation() {
    let huge = u32::MAX.to_le_bytes();
    let too_long = [&[1, 0, 0, 0][..], &huge, &1u64.to_le_bytes()].concat();
    let reserved = [&[1, 0, 7, 0][..], &[0; 4], &1u64.to_le_bytes()].concat();
    let unknown_rank = frame(255, 1, &7u32.to_le_bytes());
    for bytes in [too_long, reserved, frame(77, 1, &[]), unknown_rank, frame(255, 1, &[])] {
        let error = error_after(&bytes, |group| group.all_gather(b"x"));
        assert!(
            matches!(failed_peer(&error), (1, Operation::AllGather, PeerFailure::Malformed(_))),
            "{error}"
        );
    }
    let endless = frame(Operation::Broadcast as u8, 1, &u64::MAX.to_le_bytes());
    let error = error_after(&endless, |group| group.broadcast(1, &mut Vec::new()));
    assert!(matches!(failed_peer(&error), (1, Operation::Broadcast, PeerFailure::Malformed(_))), "{error}");
}

#[test]
fn ranks_in_different_operations_are_an_error() {
    let errors = on_ranks(2, TEST_TIMEOUT, |mut group| match group.rank() {
        0 => group.barrier().unwrap_err(),
        _ => group.all_gather(&[]).map(drop).unwrap_err(),
    });
    let mismatch = |error: &CollectiveError| match failed_peer(error) {
        (rank, _, PeerFailure::Mismatch { operation, sequence: 1 }) => Some((rank, *operation)),
        (rank, operation, PeerFailure::Reported { .. }) => Some((rank, operation)),
        _ => None,
    };
    assert!(errors.iter().all(|error| mismatch(error).is_some()), "{errors:?}");
    let skipped = error_after(&frame(Operation::Barrier as u8, 2, &[]), Group::barrier);
    assert!(matches!(failed_peer(&skipped), (1, _, PeerFailure::Mismatch { sequence: 2, .. })), "{skipped}");
}

#[test]
fn a_peer_that_left_is_reported_by_all_others() {
    let errors =
        on_ranks(4, TEST_TIMEOUT, |mut group| (group.rank() != 2).then(|| group.barrier().unwrap_err()));
    for error in errors.iter().flatten() {
        assert_eq!(error.suspects(), [2], "{error}");
    }
}

#[test]
fn a_hanging_peer_is_reported_within_the_timeout() {
    let done = Barrier::new(3);
    let errors = on_ranks(3, SHORT_TIMEOUT, |mut group| {
        let start = Instant::now();
        let error = (group.rank() != 2).then(|| group.barrier().unwrap_err());
        assert!(start.elapsed() < 5 * SHORT_TIMEOUT, "took {:?}", start.elapsed());
        done.wait();
        error
    });
    for error in errors.iter().flatten() {
        assert_eq!(error.suspects(), [2], "{error}");
    }
}

#[test]
fn a_peer_that_stops_reading_a_broadcast_is_reported() {
    let done = Barrier::new(2);
    let errors = on_ranks(2, SHORT_TIMEOUT, |mut group| {
        // More than the socket buffers can contain.
        let error = (group.rank() == 0).then(|| group.broadcast(0, &mut vec![0; 64 << 20]).unwrap_err());
        done.wait();
        error
    });
    let error = errors[0].as_ref().unwrap();
    assert!(matches!(failed_peer(error), (1, Operation::Broadcast, PeerFailure::TimedOut(_))), "{error}");
}

/// Rank 2 closes only its connection to rank 1. Rank 0, which only waits for rank 1's sums, must
/// not report that rank 1 is at fault.
#[test]
fn the_rank_that_detects_a_failure_names_the_failed_rank() {
    let mut specs = specs(3, TEST_TIMEOUT);
    let (peer, _) = specs.remove(2);
    let ranges = [0..1, 1..2, 2..3];
    let errors = thread::scope(|scope| {
        let ranges = &ranges;
        let ranks: Vec<_> = specs
            .into_iter()
            .map(|(spec, listener)| {
                scope.spawn(move || {
                    let mut group = Group::form(&spec, Some(&listener), CancelToken::new()).unwrap();
                    let id = nodes_in(3, &ranges[spec.rank]).unwrap()[0];
                    group.all_reduce_tree(3, ranges, &[(id, &[1.0; 300])], &mut [0.0; 300]).unwrap_err()
                })
            })
            .collect();
        let mut streams = [0, 1].map(|to| raw_connection(&peer, to));
        let numbers = [3u64, 300, 1, 2, 3].map(u64::to_le_bytes);
        for stream in &mut streams {
            stream.write_all(&frame(Operation::AllReduce as u8, 1, numbers.as_flattened())).unwrap();
        }
        let [mut to_0, to_1] = streams;
        // Both frames that rank 0 expects, and nothing for rank 1.
        to_0.write_all(&frame(Operation::AllReduce as u8, 1, &[0; 400])).unwrap();
        to_0.write_all(&frame(Operation::AllReduce as u8, 1, &[0; 400])).unwrap();
        drop(to_1);
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(matches!(failed_peer(&errors[0]), (2, _, PeerFailure::Reported { by: 1 })), "{}", errors[0]);
    assert!(matches!(failed_peer(&errors[1]), (2, _, PeerFailure::Closed)), "{}", errors[1]);
}

/// Calls [`Group::check`] until it returns an error.
fn error_of_check(group: &mut Group) -> CollectiveError {
    let start = Instant::now();
    loop {
        if let Err(error) = group.check() {
            assert!(matches!(group.check(), Err(CollectiveError::Poisoned)));
            assert!(matches!(group.barrier(), Err(CollectiveError::Poisoned)));
            return error;
        }
        assert!(start.elapsed() < TEST_TIMEOUT, "no error within the time limit");
        thread::yield_now();
    }
}

/// Forms a group of three ranks and calls `test` with rank 0 and the raw connections of ranks 1 and
/// 2.
fn with_two_raw_peers(test: impl FnOnce(Group, [TcpStream; 2]) + Send) {
    let mut specs = specs(3, TEST_TIMEOUT);
    let (first, listener) = specs.remove(0);
    thread::scope(|scope| {
        let peers = scope.spawn(|| [0, 1].map(|higher| raw_connection(&specs[higher].0, 0)));
        let group = Group::form(&first, Some(&listener), CancelToken::new()).unwrap();
        test(group, peers.join().unwrap());
    });
}

#[test]
fn a_leaving_peer_is_detected_while_waiting_for_another() {
    with_two_raw_peers(|mut group, [mut first, _second]| {
        first.write_all(&frame(Operation::Barrier as u8, 1, &[])).unwrap();
        first.write_all(&frame(255, 2, &1u32.to_le_bytes())).unwrap();
        first.shutdown(Shutdown::Write).unwrap();
        let error = group.barrier().unwrap_err();
        assert!(matches!(failed_peer(&error), (1, Operation::Barrier, PeerFailure::Left)), "{error}");
    });
}

#[test]
fn check_accepts_silent_and_ahead_peers() {
    with_two_raw_peers(|mut group, mut peers| {
        group.check().unwrap();
        for (rank, peer) in peers.iter_mut().enumerate() {
            peer.write_all(&frame(Operation::AllGather as u8, 1, &[rank as u8; 9])).unwrap();
            group.check().unwrap();
        }
        let gathered = group.all_gather(b"mine").unwrap();
        assert_eq!(gathered, [b"mine".to_vec(), vec![0; 9], vec![1; 9]], "check consumes nothing");
        group.check().unwrap();
    });
    let mut alone = Group::single();
    alone.check().unwrap();
}

#[test]
fn check_reports_a_disconnected_peer() {
    with_two_raw_peers(|mut group, [_first, second]| {
        drop(second);
        let error = error_of_check(&mut group);
        assert!(matches!(failed_peer(&error), (2, Operation::Device, PeerFailure::Closed)), "{error}");
        assert_eq!(error.suspects(), [2]);
    });
}

#[test]
fn check_finds_an_abort_behind_unread_frames() {
    let ahead = frame(Operation::Broadcast as u8, 1, &[0; 10_000]);
    with_two_raw_peers(|mut group, [mut first, _second]| {
        first.write_all(&ahead).unwrap();
        first.write_all(&ahead[..700]).unwrap();
        first.shutdown(Shutdown::Write).unwrap();
        let error = error_of_check(&mut group);
        assert!(matches!(failed_peer(&error), (1, Operation::Device, PeerFailure::Closed)), "{error}");
    });
    with_two_raw_peers(|mut group, [mut first, mut second]| {
        first.write_all(&ahead).unwrap();
        first.write_all(&frame(255, 2, &2u32.to_le_bytes())).unwrap();
        first.shutdown(Shutdown::Write).unwrap();
        let error = error_of_check(&mut group);
        assert!(matches!(failed_peer(&error), (2, _, PeerFailure::Reported { by: 1 })), "{error}");
        // Rank 0 forwards the abort.
        let mut received = Vec::new();
        second.read_to_end(&mut received).unwrap();
        assert!(received.ends_with(&frame(255, 1, &2u32.to_le_bytes())), "{received:?}");
    });
}

#[test]
fn check_fails_after_cancel() {
    with_two_raw_peers(|mut group, [mut first, _second]| {
        group.cancel_token().cancel();
        assert!(matches!(group.check(), Err(CollectiveError::Cancelled)));
        assert!(matches!(group.barrier(), Err(CollectiveError::Cancelled)));
        let mut received = Vec::new();
        first.read_to_end(&mut received).unwrap();
        assert!(received.ends_with(&frame(255, 1, &0u32.to_le_bytes())), "{received:?}");
    });
}

#[test]
fn unrelated_connections_do_not_disturb_the_rendezvous() {
    let mut specs = specs(2, TEST_TIMEOUT);
    let address = specs[0].0.peers[0].clone();
    let silent = TcpStream::connect(&address).unwrap();
    let mut garbage = TcpStream::connect(&address).unwrap();
    garbage.write_all(&[b'G'; 4096]).unwrap();
    drop(TcpStream::connect(&address).unwrap());
    let mut half = TcpStream::connect(&address).unwrap();
    half.write_all(b"LORAPEER").unwrap();

    let start = Instant::now();
    thread::scope(|scope| {
        for (spec, listener) in specs.drain(..) {
            scope.spawn(move || {
                Group::form(&spec, Some(&listener), CancelToken::new()).unwrap().barrier().unwrap()
            });
        }
    });
    assert!(start.elapsed() < Duration::from_secs(4), "other callers delayed it: {:?}", start.elapsed());
    drop((silent, half));
}

/// Returns the errors of rank 0, which forms the original group, and of rank 1, whose spec is
/// changed by `change`.
fn refused(change: SpecChange) -> [CollectiveError; 2] {
    let mut specs = specs(2, SHORT_TIMEOUT);
    let (mut wrong, _) = specs.remove(1);
    let (spec, listener) = specs.remove(0);
    change(&mut wrong);
    thread::scope(|scope| {
        let rank0 = scope.spawn(move || {
            Group::form(&spec, Some(&listener), CancelToken::new()).err().expect("must not form")
        });
        let rank1 = Group::form(&wrong, None, CancelToken::new()).err().expect("must not form");
        [rank0.join().unwrap(), rank1]
    })
}

#[test]
fn mismatched_hellos_are_refused_with_the_reason() {
    let cases: [(SpecChange, &str); 4] = [
        (|spec| spec.token = "guess".into(), "wrong token"),
        (|spec| spec.job = "job-2".into(), "another job"),
        (|spec| spec.generation = 2, "an older generation"),
        (|spec| spec.peers.push("127.0.0.1:1".into()), "another world size"),
    ];
    for (change, reason) in cases {
        let [rank0, rank1] = refused(change);
        assert!(matches!(&rank0, CollectiveError::Missing { ranks, .. } if *ranks == [1]), "{rank0}");
        assert!(rank1.to_string().contains(reason), "{rank1}");
        assert_eq!(rank1.suspects(), [0]);
    }
}

#[test]
fn a_newer_generation_ends_an_older_rendezvous() {
    let [rank0, _] = refused(|spec| spec.generation = 4);
    assert!(matches!(rank0, CollectiveError::Superseded { generation: 3, newer: 4 }), "{rank0}");
}

#[test]
fn a_second_connection_for_a_rank_is_refused() {
    let mut specs = specs(3, TEST_TIMEOUT);
    let (last, _) = specs.remove(2);
    let (second, second_listener) = specs.remove(1);
    let (first, first_listener) = specs.remove(0);
    thread::scope(|scope| {
        scope.spawn(move || Group::form(&first, Some(&first_listener), CancelToken::new()).unwrap());
        // Rank 2 is connected with rank 0, which still waits for rank 1.
        let mut stream = raw_handshake(&last, 0);
        let double =
            scope.spawn(|| Group::form(&last, None, CancelToken::new()).err().expect("must not form"));
        let error = double.join().unwrap();
        assert!(error.to_string().contains("connected already"), "{error}");
        scope.spawn(move || Group::form(&second, Some(&second_listener), CancelToken::new()).unwrap());
        stream.write_all(&frame(Operation::Barrier as u8, 0, &[])).unwrap();
        let mut other = raw_connection(&last, 1);
        // Both ranks finish the formation: they send their barrier frames and then close the
        // connections.
        for stream in [&mut stream, &mut other] {
            stream.read_exact(&mut [0; 16]).unwrap();
            stream.read_to_end(&mut Vec::new()).unwrap();
        }
    });
}

#[test]
fn invalid_group_specs_are_rejected() {
    let cases: [(SpecChange, &str); 4] = [
        (|spec| spec.rank = 2, "rank 2 in a group of 2 ranks"),
        (|spec| spec.token = "x".repeat(257), "a token of 257 bytes"),
        (|spec| spec.timeout = Duration::ZERO, "a timeout of zero"),
        (|spec| spec.rank = 0, "rank 0 needs a peer listener"),
    ];
    for (change, expected) in cases {
        let (mut spec, _) = specs(2, SHORT_TIMEOUT).remove(1);
        change(&mut spec);
        let error = Group::form(&spec, None, CancelToken::new()).err().expect("must not form");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn the_token_is_not_printed() {
    let (spec, _) = specs(1, SHORT_TIMEOUT).remove(0);
    assert!(!format!("{spec:?}").contains("secret"));
}
