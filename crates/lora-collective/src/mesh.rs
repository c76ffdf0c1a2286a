//! All connections of a rank, and the building blocks of the operations: sending and receiving at
//! the same time.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, Timespec, poll};
use rustix::io::retry_on_intr;

use crate::error::PeerFailure;
use crate::link::{Call, CallFailure, Link};

pub(crate) struct Mesh {
    pub(crate) rank: usize,
    /// Links to the other ranks, starting at `rank + 1` and wrapping around. Because every rank
    /// receives in this order, no two ranks wait for the same peer.
    pub(crate) links: Vec<Link>,
    pub(crate) timeout: Duration,
}

impl Mesh {
    pub(crate) fn new(rank: usize, mut links: Vec<Link>, timeout: Duration) -> Self {
        let world_size = links.len() + 1;
        links.sort_by_key(|link| (link.rank + world_size - rank) % world_size);
        Self { rank, links, timeout }
    }

    pub(crate) fn world_size(&self) -> usize {
        self.links.len() + 1
    }

    /// The time limit of a wait for a peer that may itself be waiting for a third rank. It is
    /// longer than `timeout`, so that the rank that waits for the failed rank directly times out
    /// first and reports the failed rank to the others.
    pub(crate) fn indirect_timeout(&self) -> Duration {
        self.timeout + self.timeout / 4
    }

    /// Runs `send` for every peer, each on its own thread, and `receive` on the calling thread. All
    /// threads have ended when this returns.
    ///
    /// A failure to receive takes precedence over a failure to send: it shows what the peer did,
    /// while a failure to send may only mean that the peer left because another rank failed.
    pub(crate) fn exchange<T>(
        &self,
        call: &Call,
        send: impl Fn(&Link) -> Result<(), CallFailure> + Sync,
        receive: impl FnOnce() -> Result<T, CallFailure>,
    ) -> Result<T, CallFailure> {
        thread::scope(|scope| {
            let send = &send;
            let senders: Vec<_> =
                self.links.iter().map(|link| (link, scope.spawn(move || send(link)))).collect();
            let received = receive();
            if received.is_err() {
                call.abort();
            }
            let mut unsent = Ok(());
            for (link, sender) in senders {
                let sent = sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                if let (Ok(_), Err(failure)) = (&received, sent) {
                    unsent = unsent.and(Err(link.read_abort(call, failure)));
                }
            }
            received.and_then(|value| unsent.map(|()| value))
        })
    }

    /// Returns every rank's payload, by rank, each of at most `limit` bytes.
    ///
    /// Ranks wait in this function for late peers, so it reads from all peers at the same time: the
    /// failure of a peer is detected while others are still awaited, even if the failed peer has
    /// already sent its payload.
    pub(crate) fn gather(
        &self,
        call: &Call,
        payload: &[u8],
        limit: usize,
    ) -> Result<Vec<Vec<u8>>, CallFailure> {
        let arrived: Vec<AtomicBool> = self.links.iter().map(|_| AtomicBool::new(false)).collect();
        let receive = || {
            thread::scope(|scope| {
                let readers: Vec<_> = self
                    .links
                    .iter()
                    .zip(&arrived)
                    .map(|(link, has_arrived)| {
                        let arrived = &arrived;
                        let read = move || {
                            let awaited = self.await_frame(call, link, arrived);
                            let received = awaited.and_then(|()| link.receive(call, self.timeout, limit));
                            has_arrived.store(received.is_ok(), Ordering::Relaxed);
                            received
                                .map_err(|failure| if call.abort() { failure } else { CallFailure::Aborted })
                        };
                        (link.rank, scope.spawn(read))
                    })
                    .collect();
                let mut all = vec![Vec::new(); self.world_size()];
                let mut first = Ok(());
                for (rank, reader) in readers {
                    match reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
                        Ok(received) => all[rank] = received,
                        Err(CallFailure::Aborted) => first = first.and(Err(CallFailure::Aborted)),
                        Err(failure) => first = Err(failure),
                    }
                }
                first.map(|()| all)
            })
        };
        let mut all =
            self.exchange(call, |link| link.send(call, self.indirect_timeout(), &[payload]), receive)?;
        all[self.rank] = payload.to_vec();
        Ok(all)
    }

    /// Waits until a frame from `link` begins, and fails if a peer whose frame has `arrived`
    /// aborts.
    fn await_frame(&self, call: &Call, link: &Link, arrived: &[AtomicBool]) -> Result<(), CallFailure> {
        let start = Instant::now();
        while !link.is_ready() {
            call.check()?;
            if start.elapsed() >= self.timeout {
                return Err(link.failed(PeerFailure::TimedOut(self.timeout)));
            }
            let mut others = self.links.iter().zip(arrived).filter(|(_, it)| it.load(Ordering::Relaxed));
            if let Some(failure) = others.find_map(|(other, _)| other.peek_abort()) {
                return Err(failure);
            }
        }
        Ok(())
    }

    /// Returns a peer that has closed its connection or its sending side. Neither sends nor waits.
    pub(crate) fn disconnected_peer(&self) -> io::Result<Option<&Link>> {
        let mut polls: Vec<PollFd> = self.links.iter().map(Link::hangup_poll).collect();
        retry_on_intr(|| poll(&mut polls, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })))?;
        let mut links = self.links.iter().zip(polls);
        Ok(links.find(|(_, hangup_poll)| !hangup_poll.revents().is_empty()).map(|(link, _)| link))
    }

    /// Sends an abort to all peers, which ends the group for them.
    pub(crate) fn send_abort(&self, call: &Call, failed_rank: usize) {
        for link in &self.links {
            link.send_abort(call, failed_rank);
        }
    }
}
