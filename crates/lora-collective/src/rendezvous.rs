//! The formation of a group: every rank connects to the lower ranks and accepts the higher ranks.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::cancel::CancelToken;
use crate::error::CollectiveError;
use crate::group_spec::GroupSpec;
use crate::handshake::{self, HelloVerdict};
use crate::link::{Link, POLL_INTERVAL};
use crate::mesh::Mesh;
use crate::refusal::HandshakeRefusal;

/// The time limit of a handshake, from the moment when the connection is accepted.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The maximum number of concurrent handshakes. Further callers wait in the backlog.
const MAX_HANDSHAKES: usize = 256;
/// The pause between two checks of the listener and the handshakes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(2);
/// The first and the longest pause between two calls to a rank that is not ready.
const FIRST_RETRY_PAUSE: Duration = Duration::from_millis(10);
const LAST_RETRY_PAUSE: Duration = Duration::from_millis(500);
/// The time limit of one attempt to connect to an address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The listener on which a process accepts connections of its peers, for one group after the other.
/// It is bound once, at the start of the process, so that its address is known before a group
/// forms.
#[derive(Debug)]
pub struct PeerListener(TcpListener);

impl PeerListener {
    /// Listens on `address`. Port 0 chooses a free port.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn bind(address: impl ToSocketAddrs) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// Returns the address, with the port that is in use.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Connects the rank of `spec` with all other ranks. See [`Group::form`](crate::Group::form), which
/// has the arguments and the errors.
pub(crate) fn form_mesh(
    spec: &GroupSpec,
    listener: Option<&PeerListener>,
    cancel: &CancelToken,
) -> Result<Mesh, CollectiveError> {
    spec.check()?;
    let _waiting = cancel.waiting();
    let deadline = FormDeadline { at: Instant::now() + spec.form_timeout, cancel };
    let mut streams = BTreeMap::new();
    // A rank first connects to the lower ranks, one after the other, and then accepts the higher
    // ones. Rank 0 only accepts, so rank 1 can connect and then accepts, and so on.
    for rank in 0..spec.rank {
        streams.insert(rank, connect(spec, rank, &deadline)?);
    }
    if spec.rank + 1 < spec.peers.len() {
        let Some(listener) = listener else {
            return Err(CollectiveError::Argument(format!("rank {} needs a peer listener", spec.rank)));
        };
        streams.extend(accept(spec, listener, &deadline)?);
    }
    let world_size = spec.peers.len();
    let links: Result<Vec<Link>, io::Error> =
        streams.into_iter().map(|(rank, stream)| Link::new(rank, world_size, stream)).collect();
    let links = links.map_err(CollectiveError::Socket)?;
    // A minimum, for the ranks that were the last to connect.
    let timeout = deadline.remaining().max(HANDSHAKE_TIMEOUT);
    Ok(Mesh::new(spec.rank, links, timeout))
}

/// The end of the formation, at a time or by cancellation.
struct FormDeadline<'a> {
    at: Instant,
    cancel: &'a CancelToken,
}

impl FormDeadline<'_> {
    fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Returns an error after the deadline or a cancellation.
    fn check(&self) -> io::Result<()> {
        if self.cancel.is_cancelled() {
            Err(io::Error::other("cancelled"))
        } else if self.remaining().is_zero() {
            Err(ErrorKind::TimedOut.into())
        } else {
            Ok(())
        }
    }

    /// Waits for `pause`, or until the deadline or a cancellation if that is earlier.
    fn sleep(&self, pause: Duration) {
        let end = self.at.min(Instant::now() + pause);
        while Instant::now() < end && !self.cancel.is_cancelled() {
            thread::sleep(POLL_INTERVAL.min(pause));
        }
    }
}

/// Calls a lower rank until it welcomes this rank.
fn connect(spec: &GroupSpec, rank: usize, deadline: &FormDeadline) -> Result<TcpStream, CollectiveError> {
    let address = spec.peers[rank].clone();
    let hello = handshake::hello(spec, rank);
    let mut pause = FIRST_RETRY_PAUSE;
    loop {
        let reason = match try_connect(&address, &hello, deadline) {
            Ok(Ok(stream)) => return Ok(stream),
            _ if deadline.cancel.is_cancelled() => return Err(CollectiveError::Cancelled),
            Ok(Err(refusal)) if refusal.is_permanent() => {
                return Err(CollectiveError::Refused { rank, address, refusal });
            }
            Ok(Err(refusal)) => format!("refused: {refusal}"),
            Err(error) => error.to_string(),
        };
        if deadline.remaining() <= pause {
            return Err(CollectiveError::NoConnection { rank, address, timeout: spec.form_timeout, reason });
        }
        deadline.sleep(pause);
        pause = (2 * pause).min(LAST_RETRY_PAUSE);
    }
}

/// Makes one attempt. It waits for the answer until the deadline of the formation, because the peer
/// may not have begun to form its group.
fn try_connect(
    address: &str,
    hello: &[u8],
    deadline: &FormDeadline,
) -> io::Result<Result<TcpStream, HandshakeRefusal>> {
    let mut stream = connect_tcp(address, deadline)?;
    stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT))?;
    stream.write_all(hello)?;
    stream.set_read_timeout(Some(POLL_INTERVAL))?;
    let mut reply = [0; handshake::REPLY_BYTES];
    let mut filled = 0;
    while filled < reply.len() {
        deadline.check()?;
        match stream.read(&mut reply[filled..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => filled += read,
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut
                ) => {}
            Err(error) => return Err(error),
        }
    }
    match handshake::read_reply(&reply) {
        Some(Ok(())) => stream.write_all(&[handshake::CONFIRM]).map(|()| Ok(stream)),
        Some(Err(refusal)) => Ok(Err(refusal)),
        None => Err(io::Error::new(ErrorKind::InvalidData, "the answer is not from a peer")),
    }
}

/// Connects on a separate thread, because neither the lookup of a name nor the connection attempt
/// can be interrupted. A thread whose caller has stopped waiting ends by itself and closes its
/// connection.
fn connect_tcp(address: &str, deadline: &FormDeadline) -> io::Result<TcpStream> {
    deadline.check()?;
    let (sender, connected) = mpsc::sync_channel(1);
    let (address, end) = (address.to_owned(), deadline.at);
    thread::Builder::new().name("peer-connect".into()).spawn(move || {
        // Sending fails if the caller has stopped waiting.
        let _ = sender.send(connect_tcp_blocking(&address, end));
    })?;
    loop {
        match connected.recv_timeout(POLL_INTERVAL) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) => deadline.check()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(io::Error::other("the connecting thread ended without a result"));
            }
        }
    }
}

fn connect_tcp_blocking(address: &str, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the host name has no address");
    for address in address.to_socket_addrs()? {
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(&address, remaining.min(CONNECT_TIMEOUT)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Accepts the connections of all higher ranks. Other callers are refused and do not delay the
/// members.
fn accept(
    spec: &GroupSpec,
    listener: &PeerListener,
    deadline: &FormDeadline,
) -> Result<BTreeMap<usize, TcpStream>, CollectiveError> {
    let higher = spec.rank + 1..spec.peers.len();
    let mut connected: BTreeMap<usize, TcpStream> = BTreeMap::new();
    let mut callers: Vec<PendingPeer> = Vec::new();
    while connected.len() < higher.len() {
        if deadline.cancel.is_cancelled() {
            return Err(CollectiveError::Cancelled);
        }
        if deadline.remaining().is_zero() {
            let ranks = higher.filter(|rank| !connected.contains_key(rank)).collect();
            return Err(CollectiveError::Missing { ranks, timeout: spec.form_timeout });
        }
        while callers.len() < MAX_HANDSHAKES {
            match listener.0.accept() {
                Ok((stream, address)) => callers.extend(PendingPeer::new(stream, address)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The caller has already closed its connection.
                Err(error)
                    if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                Err(error) => return Err(CollectiveError::Socket(error)),
            }
        }
        for mut caller in std::mem::take(&mut callers) {
            match caller.advance(spec, |rank| connected.contains_key(&rank)) {
                Ok(HandshakeProgress::Waiting) => callers.push(caller),
                Ok(HandshakeProgress::Connected(rank)) => {
                    // If two callers were welcomed as the same rank, the first one to confirm is
                    // accepted.
                    connected.entry(rank).or_insert(caller.stream);
                }
                Ok(HandshakeProgress::Newer(newer)) => {
                    return Err(CollectiveError::Superseded { generation: spec.generation, newer });
                }
                Err(reason) => {
                    let PendingPeer { address, .. } = &caller;
                    tracing::warn!(%address, job = spec.job, %reason, "peer connection refused");
                }
            }
        }
        thread::sleep(ACCEPT_PAUSE);
    }
    Ok(connected)
}

/// A connection whose handshake is in progress. Its operations do not block.
struct PendingPeer {
    stream: TcpStream,
    address: SocketAddr,
    since: Instant,
    bytes: Vec<u8>,
    welcomed: Option<usize>,
}

enum HandshakeProgress {
    Waiting,
    Connected(usize),
    Newer(u64),
}

impl PendingPeer {
    fn new(stream: TcpStream, address: SocketAddr) -> Option<Self> {
        stream.set_nonblocking(true).ok()?;
        Some(Self { stream, address, since: Instant::now(), bytes: Vec::new(), welcomed: None })
    }

    /// Advances the handshake as far as the received bytes allow. An error ends the connection.
    fn advance(
        &mut self,
        spec: &GroupSpec,
        is_connected: impl Fn(usize) -> bool,
    ) -> io::Result<HandshakeProgress> {
        let progress = match self.welcomed {
            None => self.check_hello(spec, is_connected)?,
            Some(rank) => self.confirm(rank)?,
        };
        if matches!(progress, HandshakeProgress::Waiting) && self.since.elapsed() >= HANDSHAKE_TIMEOUT {
            return Err(io::Error::new(ErrorKind::TimedOut, "handshake not finished in time"));
        }
        Ok(progress)
    }

    fn check_hello(
        &mut self,
        spec: &GroupSpec,
        is_connected: impl Fn(usize) -> bool,
    ) -> io::Result<HandshakeProgress> {
        if !self.fill(handshake::PREFIX_BYTES)? {
            return Ok(HandshakeProgress::Waiting);
        }
        let verdict = match handshake::body_length(&self.bytes[..handshake::PREFIX_BYTES]) {
            Ok(length) if !self.fill(handshake::PREFIX_BYTES + length)? => {
                return Ok(HandshakeProgress::Waiting);
            }
            Ok(_) => handshake::check_hello(spec, is_connected, &self.bytes[handshake::PREFIX_BYTES..]),
            Err(verdict) => verdict,
        };
        match verdict {
            HelloVerdict::Welcome(rank) => {
                self.stream.write_all(&handshake::reply(None))?;
                self.bytes.clear();
                self.welcomed = Some(rank);
                Ok(HandshakeProgress::Waiting)
            }
            HelloVerdict::Refuse(refusal) => {
                self.stream.write_all(&handshake::reply(Some(refusal)))?;
                Err(io::Error::other(refusal.to_string()))
            }
            HelloVerdict::Newer(generation) => Ok(HandshakeProgress::Newer(generation)),
            HelloVerdict::Malformed => {
                Err(io::Error::new(ErrorKind::InvalidData, "not the handshake of a peer"))
            }
        }
    }

    fn confirm(&mut self, rank: usize) -> io::Result<HandshakeProgress> {
        match (self.fill(1)?, self.bytes.as_slice()) {
            (false, _) => Ok(HandshakeProgress::Waiting),
            (true, [handshake::CONFIRM]) => Ok(HandshakeProgress::Connected(rank)),
            (true, _) => Err(io::Error::new(ErrorKind::InvalidData, "not the confirmation of a peer")),
        }
    }

    /// Reads until the buffer has `length` bytes, and no bytes beyond them. Returns whether it has
    /// them.
    fn fill(&mut self, length: usize) -> io::Result<bool> {
        while let missing @ 1.. = length.saturating_sub(self.bytes.len()) {
            match (&self.stream).take(missing as u64).read_to_end(&mut self.bytes) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}
