//! Groups whose ranks are threads of the test, connected over the loopback interface.

use std::thread;
use std::time::Duration;

use lora_collective::{CancelToken, Group, GroupSpec, PeerListener};

/// Longer than any successful test takes.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn specs(world_size: usize, timeout: Duration) -> Vec<(GroupSpec, PeerListener)> {
    let listeners: Vec<PeerListener> =
        (0..world_size).map(|_| PeerListener::bind("127.0.0.1:0").unwrap()).collect();
    let peers: Vec<String> = listeners.iter().map(|l| l.local_addr().unwrap().to_string()).collect();
    let spec = |rank| GroupSpec {
        job: "job-1".into(),
        generation: 3,
        rank,
        peers: peers.clone(),
        token: "secret".into(),
        form_timeout: timeout,
        timeout,
    };
    listeners.into_iter().enumerate().map(|(rank, listener)| (spec(rank), listener)).collect()
}

/// Forms a group and returns the results of `body` on each rank.
pub(crate) fn on_ranks<T: Send>(
    world_size: usize,
    timeout: Duration,
    body: impl Fn(Group) -> T + Sync,
) -> Vec<T> {
    thread::scope(|scope| {
        let body = &body;
        let start = |(spec, listener): (GroupSpec, PeerListener)| {
            scope.spawn(move || body(Group::form(&spec, Some(&listener), CancelToken::new()).unwrap()))
        };
        let ranks: Vec<_> = specs(world_size, timeout).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}
