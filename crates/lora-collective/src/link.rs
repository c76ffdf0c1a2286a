//! One connection to one peer, and the frames on it.
//!
//! A frame is a header of 16 bytes and a payload, all numbers little-endian:
//!
//! | bytes | |
//! | --- | --- |
//! | 0 | kind: an [`Operation`], or 255 for an abort |
//! | 1..4 | zero |
//! | 4..8 | length of the payload in bytes, u32 |
//! | 8..16 | number of the operation in the group, u64 |
//!
//! An abort says that its sender gives the group up; its payload is the rank at fault, u32: the sender itself where it
//! leaves of its own accord.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cancel::Cancel;
use crate::error::{Operation, PeerFailure};

const HEADER_BYTES: usize = 16;
const ABORT: u8 = 255;

/// How long a read or write blocks before it looks at the clock and at whether the call was given up.
pub(crate) const TICK: Duration = Duration::from_millis(20);

/// The operation in progress.
pub(crate) struct Call {
    pub(crate) operation: Operation,
    pub(crate) sequence: u64,
    given_up: AtomicBool,
    cancel: Cancel,
}

impl Call {
    pub(crate) fn new(operation: Operation, sequence: u64, cancel: Cancel) -> Self {
        Self { operation, sequence, given_up: AtomicBool::new(false), cancel }
    }

    /// Makes every wait of this call end soon. True for the first to ask.
    pub(crate) fn give_up(&self) -> bool {
        !self.given_up.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> Result<(), Stop> {
        let given_up = self.given_up.load(Ordering::Relaxed) || self.cancel.is_cancelled();
        if given_up { Err(Stop::GivenUp) } else { Ok(()) }
    }
}

/// Why a part of a call ended early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// A peer failed.
    Failed { rank: usize, failure: PeerFailure },
    /// Another part of the call stopped first, and its reason counts; or the call was cancelled.
    GivenUp,
}

/// The connection to the peer of one rank. Sending and receiving may go on at once, from a thread each.
pub(crate) struct Link {
    pub(crate) rank: usize,
    world_size: usize,
    stream: TcpStream,
    /// A frame was begun and not ended, so that no other may follow.
    mid_frame: AtomicBool,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Link {
    pub(crate) fn new(rank: usize, world_size: usize, stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))?;
        let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self { rank, world_size, stream, mid_frame: AtomicBool::new(false), sent, received })
    }

    /// Payload bytes sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Payload bytes received so far.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Sends one frame whose payload is the `parts` in a row, together less than 4 GiB.
    pub(crate) fn send(&self, call: &Call, patience: Duration, parts: &[&[u8]]) -> Result<(), Stop> {
        call.check()?;
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let header = header(call.operation as u8, length as u32, call.sequence);
        let mut slices: Vec<IoSlice> = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        let mut rest = &mut slices[..];

        self.mid_frame.store(true, Ordering::Relaxed);
        let mut progress = Instant::now();
        while !rest.is_empty() {
            call.check()?;
            match (&self.stream).write_vectored(rest) {
                Ok(0) => return Err(self.failed(PeerFailure::Closed)),
                Ok(written) => {
                    IoSlice::advance_slices(&mut rest, written);
                    progress = Instant::now();
                }
                Err(error) => self.wait_on(error, progress, patience)?,
            }
        }
        self.mid_frame.store(false, Ordering::Relaxed);
        self.sent.fetch_add(length as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Receives one frame of at most `limit` bytes.
    pub(crate) fn receive(&self, call: &Call, patience: Duration, limit: usize) -> Result<Vec<u8>, Stop> {
        let length = self.receive_header(call, patience)?;
        if length > limit {
            return Err(self.failed(PeerFailure::Malformed("longer than the operation allows")));
        }
        let mut payload = vec![0; length];
        self.receive_payload(call, patience, &mut payload)?;
        Ok(payload)
    }

    /// Receives one frame that must be as long as `payload`, into it.
    pub(crate) fn receive_into(
        &self,
        call: &Call,
        patience: Duration,
        payload: &mut [u8],
    ) -> Result<(), Stop> {
        if self.receive_header(call, patience)? != payload.len() {
            return Err(self.failed(PeerFailure::Malformed("not of the length the operation demands")));
        }
        self.receive_payload(call, patience, payload)
    }

    /// After `stop` of sending: what the peer had to say for itself, if it gave the group up before, else `stop`.
    /// Everything due from the peer must have been received.
    pub(crate) fn last_words(&self, call: &Call, stop: Stop) -> Stop {
        match self.receive_header(call, Duration::ZERO) {
            Err(reported @ Stop::Failed { failure: PeerFailure::Reported { .. }, .. }) => reported,
            _ => stop,
        }
    }

    /// To be looked at with `poll`: an event says that the peer sends nothing any more.
    pub(crate) fn departure(&self) -> PollFd<'_> {
        PollFd::new(&self.stream, PollFlags::RDHUP)
    }

    /// Whether there is something to receive, or nothing will ever be again; waits a [`TICK`] for it.
    pub(crate) fn is_ready(&self) -> bool {
        has_event(PollFd::new(&self.stream, PollFlags::IN | PollFlags::RDHUP), TICK)
    }

    /// Why the peer hung up, if it did so right behind what was received of it. Takes nothing away.
    pub(crate) fn hung_up(&self) -> Option<Stop> {
        let mut frame = [0; HEADER_BYTES + 4];
        let hung_up = has_event(self.departure(), Duration::ZERO)
            && self.stream.peek(&mut frame).is_ok_and(|length| length == frame.len())
            && frame[0] == ABORT;
        let [.., c0, c1, c2, c3] = frame;
        hung_up.then(|| self.abort([c0, c1, c2, c3]))
    }

    /// Why the peer, which sends nothing any more, left. Frames that were not received yet are lost.
    pub(crate) fn parting_words(&self, call: &Call) -> Stop {
        let mut unread = [0; 4096];
        loop {
            let mut length = match self.receive_any_header(call, Duration::ZERO) {
                Ok((_, _, length)) => length,
                Err(stop) => return stop,
            };
            while length > 0 {
                let part = length.min(unread.len());
                if let Err(stop) = self.read_exact(call, Duration::ZERO, &mut unread[..part]) {
                    return stop;
                }
                length -= part;
            }
        }
    }

    /// Tells the peer, if it can be told without delay, that `culprit` failed, and sends nothing ever after.
    pub(crate) fn hang_up(&self, call: &Call, culprit: usize) {
        if !self.mid_frame.load(Ordering::Relaxed) {
            let mut frame = header(ABORT, 4, call.sequence).to_vec();
            frame.extend_from_slice(&(culprit as u32).to_le_bytes());
            // Best effort: a peer that is not told finds the connection closed.
            let _ = (&self.stream).write_all(&frame);
        }
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    pub(crate) fn failed(&self, failure: PeerFailure) -> Stop {
        Stop::Failed { rank: self.rank, failure }
    }

    /// Reads a header of this call and returns the length of the payload.
    fn receive_header(&self, call: &Call, patience: Duration) -> Result<usize, Stop> {
        let (operation, sequence, length) = self.receive_any_header(call, patience)?;
        if (operation, sequence) != (call.operation, call.sequence) {
            return Err(self.failed(PeerFailure::Mismatch { operation, sequence }));
        }
        Ok(length)
    }

    /// Reads a header: operation, number and length of the payload. An abort is an error.
    fn receive_any_header(&self, call: &Call, patience: Duration) -> Result<(Operation, u64, usize), Stop> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_exact(call, patience, &mut bytes)?;
        let [kind, zero @ .., l0, l1, l2, l3, s0, s1, s2, s3, s4, s5, s6, s7] = bytes;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let sequence = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        if zero != [0; 3] {
            return Err(self.failed(PeerFailure::Malformed("reserved bytes are not zero")));
        }
        if kind == ABORT {
            return Err(self.receive_abort(call, patience, length));
        }
        let Some(operation) = Operation::from_kind(kind) else {
            return Err(self.failed(PeerFailure::Malformed("of an unknown kind")));
        };
        Ok((operation, sequence, length as usize))
    }

    fn receive_abort(&self, call: &Call, patience: Duration, length: u32) -> Stop {
        let mut culprit = [0; 4];
        if length != 4 {
            return self.failed(PeerFailure::Malformed("an abort of the wrong length"));
        }
        if let Err(stop) = self.read_exact(call, patience, &mut culprit) {
            return stop;
        }
        self.abort(culprit)
    }

    /// What an abort with this payload says.
    fn abort(&self, culprit: [u8; 4]) -> Stop {
        match u32::from_le_bytes(culprit) as usize {
            rank if rank == self.rank => self.failed(PeerFailure::Left),
            rank if rank < self.world_size => {
                Stop::Failed { rank, failure: PeerFailure::Reported { by: self.rank } }
            }
            _ => self.failed(PeerFailure::Malformed("an abort that blames no rank of the group")),
        }
    }

    fn receive_payload(&self, call: &Call, patience: Duration, payload: &mut [u8]) -> Result<(), Stop> {
        self.read_exact(call, patience, payload)?;
        self.received.fetch_add(payload.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn read_exact(&self, call: &Call, patience: Duration, mut bytes: &mut [u8]) -> Result<(), Stop> {
        let mut progress = Instant::now();
        while !bytes.is_empty() {
            call.check()?;
            match (&self.stream).read(bytes) {
                Ok(0) => return Err(self.failed(PeerFailure::Closed)),
                Ok(read) => {
                    bytes = &mut bytes[read..];
                    progress = Instant::now();
                }
                Err(error) => self.wait_on(error, progress, patience)?,
            }
        }
        Ok(())
    }

    /// What an error of the socket means: `Ok` to try again.
    fn wait_on(&self, error: io::Error, progress: Instant, patience: Duration) -> Result<(), Stop> {
        match error.kind() {
            ErrorKind::Interrupted => Ok(()),
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                if progress.elapsed() >= patience {
                    Err(self.failed(PeerFailure::TimedOut(patience)))
                } else {
                    Ok(())
                }
            }
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => {
                Err(self.failed(PeerFailure::Closed))
            }
            _ => Err(self.failed(PeerFailure::Io(error))),
        }
    }
}

fn has_event(descriptor: PollFd, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
    // A call that was interrupted has seen nothing.
    poll(&mut [descriptor], Some(&limit)).is_ok_and(|events| events > 0)
}

fn header(kind: u8, length: u32, sequence: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[0] = kind;
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    bytes[8..].copy_from_slice(&sequence.to_le_bytes());
    bytes
}
