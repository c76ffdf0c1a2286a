//! One connection to one peer, and the frames on it.
//!
//! A frame is a header of 16 bytes and a payload. All numbers are little-endian:
//!
//! | bytes | |
//! | --- | --- |
//! | 0 | kind: an [`Operation`], or 255 for an abort |
//! | 1..4 | zero |
//! | 4..8 | length of the payload in bytes, u32 |
//! | 8..16 | number of the operation in the group, u64 |
//!
//! The sender of an abort leaves the group. The payload of an abort is the rank at fault, u32. It
//! is the sender's own rank if no other rank is at fault.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cancel::CancelToken;
use crate::error::{Operation, PeerFailure};

const HEADER_BYTES: usize = 16;
const ABORT: u8 = 255;

/// How long a read or write blocks before it checks the time limit and whether the call was
/// aborted.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The operation in progress.
pub(crate) struct Call {
    pub(crate) operation: Operation,
    pub(crate) sequence: u64,
    aborted: AtomicBool,
    cancel: CancelToken,
}

impl Call {
    pub(crate) fn new(operation: Operation, sequence: u64, cancel: CancelToken) -> Self {
        Self { operation, sequence, aborted: AtomicBool::new(false), cancel }
    }

    /// Makes every wait of this call end soon. Returns true to the first caller only.
    pub(crate) fn abort(&self) -> bool {
        !self.aborted.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> Result<(), CallFailure> {
        let aborted = self.aborted.load(Ordering::Relaxed) || self.cancel.is_cancelled();
        if aborted { Err(CallFailure::Aborted) } else { Ok(()) }
    }
}

/// The reason why a part of a call ended early.
#[derive(Debug)]
pub(crate) enum CallFailure {
    /// A peer failed.
    Failed { rank: usize, failure: PeerFailure },
    /// Another part of the call failed first and has the reason, or the call was cancelled.
    Aborted,
}

/// The connection to one peer. One thread may send while another one receives.
pub(crate) struct Link {
    pub(crate) rank: usize,
    world_size: usize,
    stream: TcpStream,
    /// Whether a frame was begun and not finished, so that no other frame may follow.
    mid_frame: AtomicBool,
    sent: AtomicU64,
}

impl Link {
    pub(crate) fn new(rank: usize, world_size: usize, stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(POLL_INTERVAL))?;
        stream.set_write_timeout(Some(POLL_INTERVAL))?;
        let sent = AtomicU64::new(0);
        Ok(Self { rank, world_size, stream, mid_frame: AtomicBool::new(false), sent })
    }

    /// Payload bytes sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Sends one frame whose payload is the concatenation of `parts`, in total less than 4 GiB.
    pub(crate) fn send(&self, call: &Call, timeout: Duration, parts: &[&[u8]]) -> Result<(), CallFailure> {
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
                Err(error) => self.wait_on(error, progress, timeout)?,
            }
        }
        self.mid_frame.store(false, Ordering::Relaxed);
        self.sent.fetch_add(length as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Receives one frame of at most `limit` bytes.
    pub(crate) fn receive(
        &self,
        call: &Call,
        timeout: Duration,
        limit: usize,
    ) -> Result<Vec<u8>, CallFailure> {
        let length = self.receive_header(call, timeout)?;
        if length > limit {
            return Err(self.failed(PeerFailure::Malformed("the payload is too long for the operation")));
        }
        let mut payload = vec![0; length];
        self.receive_payload(call, timeout, &mut payload)?;
        Ok(payload)
    }

    /// Receives the payload of one frame into `payload`. Their lengths must be equal.
    pub(crate) fn receive_into(
        &self,
        call: &Call,
        timeout: Duration,
        payload: &mut [u8],
    ) -> Result<(), CallFailure> {
        if self.receive_header(call, timeout)? != payload.len() {
            return Err(self.failed(PeerFailure::Malformed("the payload has the wrong length")));
        }
        self.receive_payload(call, timeout, payload)
    }

    /// Returns the failure that the peer reported in an abort, if it sent one that names another
    /// rank, and otherwise `failure`, with which sending to the peer failed. All frames that the
    /// operation expects from the peer must have been received.
    pub(crate) fn read_abort(&self, call: &Call, failure: CallFailure) -> CallFailure {
        match self.receive_header(call, Duration::ZERO) {
            Err(reported @ CallFailure::Failed { failure: PeerFailure::Reported { .. }, .. }) => reported,
            _ => failure,
        }
    }

    /// An argument of `poll`: an event means that the peer has closed its sending side.
    pub(crate) fn hangup_poll(&self) -> PollFd<'_> {
        PollFd::new(&self.stream, PollFlags::RDHUP)
    }

    /// Waits up to [`POLL_INTERVAL`] and returns whether there is something to receive or the peer
    /// has closed its sending side.
    pub(crate) fn is_ready(&self) -> bool {
        has_event(PollFd::new(&self.stream, PollFlags::IN | PollFlags::RDHUP), POLL_INTERVAL)
    }

    /// Returns the failure in the peer's abort, if the peer has closed its sending side and the
    /// abort is the next frame. Consumes nothing.
    pub(crate) fn peek_abort(&self) -> Option<CallFailure> {
        let mut frame = [0; HEADER_BYTES + 4];
        let has_abort = has_event(self.hangup_poll(), Duration::ZERO)
            && self.stream.peek(&mut frame).is_ok_and(|length| length == frame.len())
            && frame[0] == ABORT;
        let [.., c0, c1, c2, c3] = frame;
        has_abort.then(|| self.parse_abort([c0, c1, c2, c3]))
    }

    /// Returns why the peer left, after it has closed its sending side. Frames that were not
    /// received yet are discarded.
    pub(crate) fn drain_to_failure(&self, call: &Call) -> CallFailure {
        let mut unread = [0; 4096];
        loop {
            let mut length = match self.receive_any_header(call, Duration::ZERO) {
                Ok((_, _, length)) => length,
                Err(failure) => return failure,
            };
            while length > 0 {
                let part = length.min(unread.len());
                if let Err(failure) = self.read_exact(call, Duration::ZERO, &mut unread[..part]) {
                    return failure;
                }
                length -= part;
            }
        }
    }

    /// Sends an abort that names `failed_rank`, if this is possible without delay, and closes the
    /// sending side.
    pub(crate) fn send_abort(&self, call: &Call, failed_rank: usize) {
        if !self.mid_frame.load(Ordering::Relaxed) {
            let mut frame = header(ABORT, 4, call.sequence).to_vec();
            frame.extend_from_slice(&(failed_rank as u32).to_le_bytes());
            // Best effort: a peer that does not get the abort sees that the connection is closed.
            let _ = (&self.stream).write_all(&frame);
        }
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    pub(crate) fn failed(&self, failure: PeerFailure) -> CallFailure {
        CallFailure::Failed { rank: self.rank, failure }
    }

    /// Reads a header of this call and returns the length of the payload.
    fn receive_header(&self, call: &Call, timeout: Duration) -> Result<usize, CallFailure> {
        let (operation, sequence, length) = self.receive_any_header(call, timeout)?;
        if (operation, sequence) != (call.operation, call.sequence) {
            return Err(self.failed(PeerFailure::Mismatch { operation, sequence }));
        }
        Ok(length)
    }

    /// Reads a header and returns the operation, its number and the length of the payload. An abort
    /// is an error.
    fn receive_any_header(
        &self,
        call: &Call,
        timeout: Duration,
    ) -> Result<(Operation, u64, usize), CallFailure> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_exact(call, timeout, &mut bytes)?;
        let [kind, zero @ .., l0, l1, l2, l3, s0, s1, s2, s3, s4, s5, s6, s7] = bytes;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let sequence = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        if zero != [0; 3] {
            return Err(self.failed(PeerFailure::Malformed("reserved bytes are not zero")));
        }
        if kind == ABORT {
            return Err(self.receive_abort(call, timeout, length));
        }
        let Some(operation) = Operation::from_kind(kind) else {
            return Err(self.failed(PeerFailure::Malformed("unknown kind")));
        };
        Ok((operation, sequence, length as usize))
    }

    fn receive_abort(&self, call: &Call, timeout: Duration, length: u32) -> CallFailure {
        let mut failed_rank = [0; 4];
        if length != 4 {
            return self.failed(PeerFailure::Malformed("an abort of the wrong length"));
        }
        if let Err(failure) = self.read_exact(call, timeout, &mut failed_rank) {
            return failure;
        }
        self.parse_abort(failed_rank)
    }

    /// Returns the failure that an abort with this payload reports.
    fn parse_abort(&self, failed_rank: [u8; 4]) -> CallFailure {
        match u32::from_le_bytes(failed_rank) as usize {
            rank if rank == self.rank => self.failed(PeerFailure::Left),
            rank if rank < self.world_size => {
                CallFailure::Failed { rank, failure: PeerFailure::Reported { by: self.rank } }
            }
            _ => self.failed(PeerFailure::Malformed("an abort that names no rank of the group")),
        }
    }

    fn receive_payload(&self, call: &Call, timeout: Duration, payload: &mut [u8]) -> Result<(), CallFailure> {
        self.read_exact(call, timeout, payload)?;
        Ok(())
    }

    fn read_exact(&self, call: &Call, timeout: Duration, mut bytes: &mut [u8]) -> Result<(), CallFailure> {
        let mut progress = Instant::now();
        while !bytes.is_empty() {
            call.check()?;
            match (&self.stream).read(bytes) {
                Ok(0) => return Err(self.failed(PeerFailure::Closed)),
                Ok(read) => {
                    bytes = &mut bytes[read..];
                    progress = Instant::now();
                }
                Err(error) => self.wait_on(error, progress, timeout)?,
            }
        }
        Ok(())
    }

    /// Handles an error of the socket. `Ok` means that the caller tries again.
    fn wait_on(&self, error: io::Error, progress: Instant, timeout: Duration) -> Result<(), CallFailure> {
        match error.kind() {
            ErrorKind::Interrupted => Ok(()),
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                if progress.elapsed() >= timeout {
                    Err(self.failed(PeerFailure::TimedOut(timeout)))
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
    // An interrupted call has not seen an event.
    poll(&mut [descriptor], Some(&limit)).is_ok_and(|events| events > 0)
}

fn header(kind: u8, length: u32, sequence: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[0] = kind;
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    bytes[8..].copy_from_slice(&sequence.to_le_bytes());
    bytes
}
