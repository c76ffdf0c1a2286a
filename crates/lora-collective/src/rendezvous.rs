//! Forming a group: every rank connects to the lower ranks and is called by the higher ones.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::cancel::CancelToken;
use crate::error::CollectiveError;
use crate::group::Group;
use crate::handshake::{self, HandshakeRefusal, HelloVerdict};
use crate::link::{Link, POLL_INTERVAL};
use crate::mesh::Mesh;

/// How long a caller may take for its handshake once its connection is accepted.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at a time; further callers wait in the backlog.
const MAX_HANDSHAKES: usize = 256;
/// Pause between two looks at the listener and the handshakes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(2);
/// Pauses between two calls at a rank that is not ready.
const FIRST_RETRY_PAUSE: Duration = Duration::from_millis(10);
const LAST_RETRY_PAUSE: Duration = Duration::from_millis(500);
/// The limit of one attempt to reach an address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a process takes connections of its peers, for one group after the other. Bound once, at start, so that the
/// address can be made known before there is a group.
#[derive(Debug)]
pub struct PeerListener(TcpListener);

impl PeerListener {
    /// Listens at `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn bind(address: impl ToSocketAddrs) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// The address with the port in use.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// What makes a group. Equal on all ranks but for `rank`.
#[derive(Clone)]
pub struct GroupSpec {
    /// The job's name, at most 256 bytes.
    pub job: String,
    /// The fencing number: peers of an older one are refused.
    pub generation: u64,
    /// This rank.
    pub rank: usize,
    /// The address of each rank's [`PeerListener`], `host:port`, by rank.
    pub peers: Vec<String>,
    /// The secret that members share, at most 256 bytes.
    pub token: String,
    /// How long forming may take.
    pub form_timeout: Duration,
    /// How long an operation may go without progress.
    pub timeout: Duration,
}

impl fmt::Debug for GroupSpec {
    /// Leaves out the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupSpec")
            .field("job", &self.job)
            .field("generation", &self.generation)
            .field("rank", &self.rank)
            .field("peers", &self.peers)
            .field("form_timeout", &self.form_timeout)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl Group {
    /// Connects this rank with all others and returns once all ranks are connected. All ranks but the last need a
    /// listener. A group of one opens no connection. `cancel` ends the forming, and later the group's operations.
    ///
    /// # Errors
    /// A peer that did not come, or refused, within the timeout; a newer generation of the same job; cancelled; or a
    /// `spec` that makes no group.
    pub fn form(
        spec: &GroupSpec,
        listener: Option<&PeerListener>,
        cancel: CancelToken,
    ) -> Result<Self, CollectiveError> {
        check(spec)?;
        let waiting = cancel.waiting();
        let deadline = FormDeadline { at: Instant::now() + spec.form_timeout, cancel: &cancel };
        let mut streams = BTreeMap::new();
        // In turn, and calls first: rank 0 only accepts, so rank 1 gets through and accepts, and so on.
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
        // At least a little, for the ranks that were the last to connect.
        let patience = deadline.remaining().max(HANDSHAKE_TIMEOUT);
        drop(waiting);
        let mut group = Self::new(Mesh::new(spec.rank, links, patience), cancel);
        group.barrier()?;
        group.mesh.timeout = spec.timeout;
        Ok(group)
    }
}

fn check(spec: &GroupSpec) -> Result<(), CollectiveError> {
    let problem = if spec.rank >= spec.peers.len() {
        format!("rank {} in a group of {} ranks", spec.rank, spec.peers.len())
    } else if spec.job.len() > handshake::MAX_NAME_BYTES {
        format!("a job name of {} bytes, the most is {}", spec.job.len(), handshake::MAX_NAME_BYTES)
    } else if spec.token.len() > handshake::MAX_NAME_BYTES {
        format!("a token of {} bytes, the most is {}", spec.token.len(), handshake::MAX_NAME_BYTES)
    } else if spec.timeout.is_zero() || spec.form_timeout.is_zero() {
        "a timeout of zero".to_owned()
    } else {
        return Ok(());
    };
    Err(CollectiveError::Argument(problem))
}

/// How long forming may go on.
struct FormDeadline<'a> {
    at: Instant,
    cancel: &'a CancelToken,
}

impl FormDeadline<'_> {
    fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// An error once it is over, or cancelled.
    fn check(&self) -> io::Result<()> {
        if self.cancel.is_cancelled() {
            Err(io::Error::other("cancelled"))
        } else if self.remaining().is_zero() {
            Err(ErrorKind::TimedOut.into())
        } else {
            Ok(())
        }
    }

    /// Waits for `pause`, less where this is over before.
    fn sleep(&self, pause: Duration) {
        let end = self.at.min(Instant::now() + pause);
        while Instant::now() < end && !self.cancel.is_cancelled() {
            thread::sleep(POLL_INTERVAL.min(pause));
        }
    }
}

/// Calls a lower rank until it welcomes this one.
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

/// One attempt. It waits for the answer as long as forming may take, since the peer may not be forming its group yet.
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
        None => Err(io::Error::new(ErrorKind::InvalidData, "the answer is not that of a peer")),
    }
}

/// Connects, on a thread of its own: neither the look-up of a name nor the connecting can be interrupted. A thread that
/// is not waited for any more ends by itself and closes what it got.
fn connect_tcp(address: &str, deadline: &FormDeadline) -> io::Result<TcpStream> {
    deadline.check()?;
    let (sender, connected) = mpsc::sync_channel(1);
    let (address, end) = (address.to_owned(), deadline.at);
    thread::Builder::new().name("dial".into()).spawn(move || {
        // Nobody may wait for it any more.
        let _ = sender.send(connect_tcp_blocking(&address, end));
    })?;
    loop {
        match connected.recv_timeout(POLL_INTERVAL) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) => deadline.check()?,
            Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("the dialing thread broke")),
        }
    }
}

fn connect_tcp_blocking(address: &str, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
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

/// Takes the connections of all higher ranks. Whoever else calls is turned away and disturbs nobody.
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
                // The caller left already.
                Err(error)
                    if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                Err(error) => return Err(CollectiveError::Socket(error)),
            }
        }
        for mut caller in std::mem::take(&mut callers) {
            match caller.advance(spec, |rank| connected.contains_key(&rank)) {
                Ok(HandshakeProgress::Waiting) => callers.push(caller),
                Ok(HandshakeProgress::Connected(rank)) => {
                    // Of two that were welcomed for one rank the first to confirm has it.
                    connected.entry(rank).or_insert(caller.stream);
                }
                Ok(HandshakeProgress::Newer(newer)) => {
                    return Err(CollectiveError::Superseded { generation: spec.generation, newer });
                }
                Err(reason) => {
                    tracing::warn!(address = %caller.address, job = spec.job, %reason, "peer connection turned away");
                }
            }
        }
        thread::sleep(ACCEPT_PAUSE);
    }
    Ok(connected)
}

/// A connection in its handshake; never waited for.
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

    /// Goes on as far as bytes have come; an error ends the connection.
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
            HelloVerdict::Malformed => Err(io::Error::new(ErrorKind::InvalidData, "no hello of a peer")),
        }
    }

    fn confirm(&mut self, rank: usize) -> io::Result<HandshakeProgress> {
        match (self.fill(1)?, self.bytes.as_slice()) {
            (false, _) => Ok(HandshakeProgress::Waiting),
            (true, [handshake::CONFIRM]) => Ok(HandshakeProgress::Connected(rank)),
            (true, _) => Err(io::Error::new(ErrorKind::InvalidData, "no confirmation of a peer")),
        }
    }

    /// Reads up to `want` bytes of this step, and none of what follows; true when they are there.
    fn fill(&mut self, want: usize) -> io::Result<bool> {
        while let missing @ 1.. = want.saturating_sub(self.bytes.len()) {
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
