//! The handshake of two ranks.
//!
//! The higher rank connects and sends a hello. All numbers are little-endian:
//!
//! | bytes | |
//! | --- | --- |
//! | 0..8 | magic, `LORAPEER` |
//! | 8..12 | version, u32 |
//! | 12..16 | length of the rest, u32 |
//! | 16..24 | generation, u64 |
//! | 24..28 | the caller's rank, u32 |
//! | 28..32 | the rank that it calls, u32 |
//! | 32..36 | world size, u32 |
//! | 36..40 | length of the token, u32 |
//! | 40.. | the token, followed by the job name up to the end |
//!
//! The lower rank answers with the magic and one byte: 0 for welcome, otherwise a
//! [`HandshakeRefusal`]. After a welcome, the higher rank confirms with one byte, [`CONFIRM`], and
//! is connected only then. A connection that its caller abandoned in the backlog is therefore never
//! confirmed and does not block the caller's next attempt.

use crate::group_spec::{GroupSpec, MAX_NAME_BYTES};
use crate::refusal::HandshakeRefusal;

pub(crate) const PREFIX_BYTES: usize = 16;
pub(crate) const REPLY_BYTES: usize = 9;
pub(crate) const CONFIRM: u8 = 1;

const MAGIC: [u8; 8] = *b"LORAPEER";
const VERSION: usize = 1;
const NUMBERS_BYTES: usize = 24;
const WELCOME: u8 = 0;

/// The verdict on a hello.
pub(crate) enum HelloVerdict {
    /// A member with this rank.
    Welcome(usize),
    Refuse(HandshakeRefusal),
    /// A member of the same job, in this newer generation.
    Newer(u64),
    /// Not the hello of a peer.
    Malformed,
}

pub(crate) fn hello(spec: &GroupSpec, to: usize) -> Vec<u8> {
    let body = NUMBERS_BYTES + spec.token.len() + spec.job.len();
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + body);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&(VERSION as u32).to_le_bytes());
    bytes.extend_from_slice(&(body as u32).to_le_bytes());
    bytes.extend_from_slice(&spec.generation.to_le_bytes());
    for number in [spec.rank, to, spec.peers.len(), spec.token.len()] {
        bytes.extend_from_slice(&(number as u32).to_le_bytes());
    }
    bytes.extend_from_slice(spec.token.as_bytes());
    bytes.extend_from_slice(spec.job.as_bytes());
    bytes
}

/// Returns the length of the rest of a hello, after its prefix.
pub(crate) fn body_length(prefix: &[u8]) -> Result<usize, HelloVerdict> {
    let numbers =
        prefix.strip_prefix(&MAGIC).and_then(|mut rest| Some((number(&mut rest)?, number(&mut rest)?)));
    match numbers {
        Some((VERSION, length)) if (NUMBERS_BYTES..=NUMBERS_BYTES + 2 * MAX_NAME_BYTES).contains(&length) => {
            Ok(length)
        }
        Some((version, _)) if version != VERSION => Err(HelloVerdict::Refuse(HandshakeRefusal::Version)),
        _ => Err(HelloVerdict::Malformed),
    }
}

/// Checks the body of a hello against the group of `spec`. `is_connected` returns whether a rank is
/// connected already.
pub(crate) fn check_hello(
    spec: &GroupSpec,
    is_connected: impl Fn(usize) -> bool,
    body: &[u8],
) -> HelloVerdict {
    let Some(hello) = Hello::decode(body) else { return HelloVerdict::Malformed };
    if !equal_in_constant_time(hello.token, spec.token.as_bytes()) {
        HelloVerdict::Refuse(HandshakeRefusal::Token)
    } else if hello.job != spec.job.as_bytes() {
        HelloVerdict::Refuse(HandshakeRefusal::Job)
    } else if hello.generation < spec.generation {
        HelloVerdict::Refuse(HandshakeRefusal::Generation)
    } else if hello.generation > spec.generation {
        HelloVerdict::Newer(hello.generation)
    } else if hello.world_size != spec.peers.len()
        || hello.to != spec.rank
        || !(spec.rank + 1..spec.peers.len()).contains(&hello.rank)
    {
        HelloVerdict::Refuse(HandshakeRefusal::Member)
    } else if is_connected(hello.rank) {
        HelloVerdict::Refuse(HandshakeRefusal::Duplicate)
    } else {
        HelloVerdict::Welcome(hello.rank)
    }
}

pub(crate) fn reply(refusal: Option<HandshakeRefusal>) -> [u8; REPLY_BYTES] {
    let mut bytes = [0; REPLY_BYTES];
    bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
    bytes[MAGIC.len()] = refusal.map_or(WELCOME, |refusal| refusal as u8);
    bytes
}

/// Returns the answer in a reply; `None` if the bytes are not a reply.
pub(crate) fn read_reply(bytes: &[u8; REPLY_BYTES]) -> Option<Result<(), HandshakeRefusal>> {
    match bytes.strip_prefix(&MAGIC)? {
        [WELCOME] => Some(Ok(())),
        [code] => HandshakeRefusal::from_code(*code).map(Err),
        _ => None,
    }
}

struct Hello<'a> {
    generation: u64,
    rank: usize,
    to: usize,
    world_size: usize,
    token: &'a [u8],
    job: &'a [u8],
}

impl<'a> Hello<'a> {
    fn decode(body: &'a [u8]) -> Option<Self> {
        let (generation, mut rest) = body.split_first_chunk()?;
        let (rank, to, world_size) = (number(&mut rest)?, number(&mut rest)?, number(&mut rest)?);
        let token_length = number(&mut rest)?;
        let (token, job) = rest.split_at_checked(token_length)?;
        Some(Self { generation: u64::from_le_bytes(*generation), rank, to, world_size, token, job })
    }
}

fn number(bytes: &mut &[u8]) -> Option<usize> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*number) as usize)
}

/// Compares tokens in a time that does not depend on where they differ.
fn equal_in_constant_time(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}
