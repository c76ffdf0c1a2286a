//! Groups that another thread cancels, while they form or in the middle of an operation.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod common;

use std::net::TcpListener;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use common::{TEST_TIMEOUT, on_ranks, specs};
use lora_collective::tree::nodes_in;
use lora_collective::{CancelToken, CollectiveError, Group, GroupSpec, PeerFailure, PeerListener};

/// Far longer than a cancellation takes, and far shorter than [`TEST_TIMEOUT`].
const PROMPT_LIMIT: Duration = Duration::from_secs(10);

/// Forms the group of `spec`, cancels it when `ready` returns, and returns the error.
fn cancelled_forming(
    spec: &GroupSpec,
    listener: Option<&PeerListener>,
    ready: impl FnOnce() + Send,
) -> CollectiveError {
    let (cancel, start) = (CancelToken::new(), Instant::now());
    let error = thread::scope(|scope| {
        scope.spawn(|| {
            ready();
            cancel.cancel();
        });
        Group::form(spec, listener, cancel.clone()).err().unwrap()
    });
    assert!(start.elapsed() < PROMPT_LIMIT, "took {:?}", start.elapsed());
    error
}

#[test]
fn cancel_ends_the_rendezvous() {
    let (first, listener) = specs(2, TEST_TIMEOUT).remove(0);
    let waiting = cancelled_forming(&first, Some(&listener), || {});
    assert!(matches!(waiting, CollectiveError::Cancelled), "waiting for a caller: {waiting}");

    // This peer accepts the connection and never answers.
    let mut second = specs(2, TEST_TIMEOUT).remove(1).0;
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    second.peers[0] = mute.local_addr().unwrap().to_string();
    let mut connection = None;
    let unanswered = cancelled_forming(&second, None, || connection = Some(mute.accept().unwrap()));
    assert!(matches!(unanswered, CollectiveError::Cancelled), "waiting for an answer: {unanswered}");

    // Nothing listens on this address: rank 1 tries again and again.
    drop((mute, connection));
    let refused = cancelled_forming(&second, None, || {});
    assert!(matches!(refused, CollectiveError::Cancelled), "calling repeatedly: {refused}");
}

/// Runs `operation` on the first `callers` ranks of a group of three and cancels rank 0; returns
/// their errors.
fn cancelled_operation(
    callers: usize,
    operation: impl Fn(&mut Group) -> Result<(), CollectiveError> + Sync,
) -> Vec<CollectiveError> {
    let done = Barrier::new(3);
    let errors = on_ranks(3, TEST_TIMEOUT, |mut group| {
        let token = group.cancel_token().clone();
        let error = thread::scope(|scope| {
            if group.rank() == 0 {
                scope.spawn(move || token.cancel());
            }
            let start = Instant::now();
            let error = (group.rank() < callers).then(|| operation(&mut group).unwrap_err());
            assert!(start.elapsed() < PROMPT_LIMIT, "took {:?}", start.elapsed());
            error
        });
        if group.rank() == 0 {
            assert!(matches!(group.barrier(), Err(CollectiveError::Cancelled)));
        }
        done.wait();
        error
    });
    errors.into_iter().flatten().collect()
}

#[test]
fn cancel_ends_an_operation_and_notifies_the_peers() {
    let ranges = [0..1, 1..2, 2..3];
    let reduce = |group: &mut Group| {
        let id = nodes_in(3, &ranges[group.rank()]).unwrap()[0];
        group.all_reduce_tree(3, &ranges, &[(id, &[1.0; 5000])], &mut vec![0.0; 5000])
    };
    for (what, errors) in
        [("barrier", cancelled_operation(2, Group::barrier)), ("all-reduce", cancelled_operation(2, reduce))]
    {
        assert!(matches!(errors[0], CollectiveError::Cancelled), "{what}: {}", errors[0]);
        assert!(errors[0].suspects().is_empty());
        let left = matches!(errors[1], CollectiveError::Peer { rank: 0, failure: PeerFailure::Left, .. });
        assert!(left, "{what}: {}", errors[1]);
        assert_eq!(errors[1].suspects(), [0]);
    }
}

#[test]
fn cancel_ends_a_blocked_send() {
    // More than the socket buffers can contain.
    let errors = cancelled_operation(1, |group| group.broadcast(0, &mut vec![0; 64 << 20]));
    assert!(matches!(errors[..], [CollectiveError::Cancelled]), "{errors:?}");
}

#[test]
fn a_newer_generation_forms_after_a_cancelled_one() {
    let members = specs(2, TEST_TIMEOUT);
    let cancel = CancelToken::new();
    let operation = |generation: u64, token: &CancelToken| {
        thread::scope(|scope| {
            let ranks: Vec<_> = members
                .iter()
                .map(|(spec, listener)| {
                    let spec = GroupSpec { generation, ..spec.clone() };
                    scope.spawn(move || {
                        let mut group = Group::form(&spec, Some(listener), token.clone())?;
                        token.cancel();
                        group.barrier()
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        })
    };
    for result in operation(3, &cancel) {
        assert!(result.is_err(), "the ranks share a token, and the first one cancels it");
    }
    assert!(cancel.is_cancelled());
    thread::scope(|scope| {
        for (spec, listener) in &members {
            let spec = GroupSpec { generation: 4, ..spec.clone() };
            scope.spawn(move || {
                Group::form(&spec, Some(listener), CancelToken::new()).unwrap().barrier().unwrap()
            });
        }
    });
}
