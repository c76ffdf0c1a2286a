//! Whether the devices of a group talk to each other over NCCL, or their hosts over TCP.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{CollectiveError, Operation, PeerFailure};
use crate::group::Group;

/// The first version that takes several ranks on one GPU, as [`Offer::nccl`] counts.
const SHARED_GPU_VERSION: u32 = 23_000;

/// How gradients travel between the ranks of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// Over NCCL where all ranks can, else over TCP.
    #[default]
    Auto,
    /// Over NCCL, or not at all.
    Nccl,
    /// Over TCP.
    Tcp,
}

impl Collective {
    const ALL: [Self; 3] = [Self::Auto, Self::Nccl, Self::Tcp];
}

impl FromStr for Collective {
    type Err = UnknownCollective;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|it| it.to_string() == text);
        named.ok_or_else(|| UnknownCollective(text.to_owned()))
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Nccl => "nccl",
            Self::Tcp => "tcp",
        })
    }
}

/// A word that is no [`Collective`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no collective is called `{0}`: it is auto, nccl or tcp")]
pub struct UnknownCollective(pub String);

/// What one rank wants, and what it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// What it was told to use.
    pub wanted: Collective,
    /// The version of its NCCL, as NCCL counts: 22809 is 2.28.9. `None` where it has none that can be used.
    pub nccl: Option<u32>,
    /// What tells its GPU from all others: the UUID.
    pub gpu: String,
    /// Whether it was told that ranks may share a GPU: NCCL's variable `NCCL_MULTI_RANK_GPU_ENABLE`.
    pub shares_gpu: bool,
}

/// Whether the group of these ranks uses NCCL: a function of what all know, so that all come to the same.
///
/// # Errors
/// A rank demands NCCL where it cannot be used: which one, and why not.
pub fn choose(offers: &[Offer]) -> Result<bool, String> {
    let demanding = offers.iter().position(|offer| offer.wanted == Collective::Nccl);
    match (obstacle(offers), demanding) {
        (None, _) => Ok(true),
        (Some(_), None) => Ok(false),
        (Some(obstacle), Some(rank)) => {
            Err(format!("rank {rank} demands the collective nccl, but {obstacle}"))
        }
    }
}

/// [`choose`] for the offers of all ranks of `group`.
///
/// # Errors
/// A failed peer, and [`CollectiveError::NoNccl`], on all ranks, for a rank that demands it where it cannot be used.
pub fn agree(group: &mut Group, offer: &Offer) -> Result<bool, CollectiveError> {
    let gathered = group.all_gather(&offer.encode())?;
    let mut offers = Vec::with_capacity(gathered.len());
    for (rank, bytes) in gathered.iter().enumerate() {
        match Offer::decode(bytes) {
            Some(offer) => offers.push(offer),
            None => return Err(group.blame(Operation::AllGather, rank, PeerFailure::Malformed("no offer"))),
        }
    }
    choose(&offers).map_err(CollectiveError::NoNccl)
}

/// Why the ranks cannot use NCCL, if so.
fn obstacle(offers: &[Offer]) -> Option<String> {
    if let Some(rank) = offers.iter().position(|offer| offer.wanted == Collective::Tcp) {
        return Some(format!("rank {rank} was told to use tcp"));
    }
    let mut versions = Vec::with_capacity(offers.len());
    for (rank, offer) in offers.iter().enumerate() {
        match offer.nccl {
            Some(version) => versions.push(version),
            None => {
                return Some(format!(
                    "rank {rank} has no NCCL, or NCCL_COMM_BLOCKING=1, which waits without end"
                ));
            }
        }
    }
    let first = *versions.first()?;
    if let Some(rank) = versions.iter().position(|version| *version != first) {
        let (first, other) = (Version(first), Version(versions[rank]));
        return Some(format!("rank 0 has NCCL {first} and rank {rank} has NCCL {other}"));
    }
    let shared = offers.iter().enumerate().find_map(|(rank, offer)| {
        let before = offers[..rank].iter().position(|other| other.gpu == offer.gpu)?;
        Some(format!("ranks {before} and {rank} share a GPU"))
    })?;
    if first < SHARED_GPU_VERSION {
        let least = Version(SHARED_GPU_VERSION);
        return Some(format!("{shared}, which takes NCCL {least} or newer (it is {})", Version(first)));
    }
    let rank = offers.iter().position(|offer| !offer.shares_gpu)?;
    Some(format!("{shared}, which takes NCCL_MULTI_RANK_GPU_ENABLE=1 on every rank (not set on rank {rank})"))
}

impl Offer {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.wanted as u8, self.shares_gpu.into()];
        bytes.extend_from_slice(&self.nccl.unwrap_or(0).to_le_bytes());
        bytes.extend_from_slice(self.gpu.as_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let ([wanted, shares_gpu], rest) = bytes.split_first_chunk()?;
        let (nccl, gpu) = rest.split_first_chunk()?;
        Some(Self {
            wanted: Collective::ALL.into_iter().find(|it| *it as u8 == *wanted)?,
            nccl: Some(u32::from_le_bytes(*nccl)).filter(|version| *version > 0),
            gpu: String::from_utf8(gpu.to_vec()).ok()?,
            shares_gpu: *shares_gpu != 0,
        })
    }
}

/// A version of NCCL as people write it.
struct Version(u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(code) = self;
        write!(f, "{}.{}.{}", code / 10_000, code / 100 % 100, code % 100)
    }
}
