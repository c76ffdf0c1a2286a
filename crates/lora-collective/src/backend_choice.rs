//! The choice between NCCL, which connects the devices of a group, and TCP, which connects their
//! hosts.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{CollectiveError, Operation, PeerFailure};
use crate::group::Group;

/// The first version with `NCCL_MULTI_RANK_GPU_ENABLE`, in the encoding of [`Capabilities::nccl`].
const SHARED_GPU_VERSION: u32 = 23_000;

/// How gradients travel between the ranks of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// Over NCCL if all ranks can use it, otherwise over TCP.
    #[default]
    Auto,
    /// Over NCCL. Forming the group fails if NCCL cannot be used.
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

/// A text that is not the name of a [`Collective`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid collective `{0}`: must be auto, nccl or tcp")]
pub struct UnknownCollective(pub String);

/// The preference of one rank for the transport of gradients.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Preference {
    /// The configured collective.
    pub collective: Collective,
    /// The error with which NCCL failed when an earlier group of this process formed. If it is set,
    /// this process does not use NCCL.
    pub nccl_failure: Option<String>,
}

impl From<Collective> for Preference {
    fn from(collective: Collective) -> Self {
        Self { collective, nccl_failure: None }
    }
}

/// The preference of one rank, and what the rank can use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// The configured collective.
    pub wanted: Collective,
    /// The version of the rank's NCCL in NCCL's encoding: 22809 is 2.28.9. If NCCL cannot be used,
    /// the reason and the remedy.
    pub nccl: Result<u32, String>,
    /// The UUID of the rank's GPU.
    pub gpu: String,
    /// NCCL's variable `NCCL_HOSTID`, which replaces the host's name and boot id: NCCL compares the
    /// GPUs of two ranks only if their host ids are equal. A value in NCCL's settings file
    /// (`NCCL_CONF_FILE`) is not considered.
    pub host_id: Option<String>,
    /// Whether NCCL's variable `NCCL_MULTI_RANK_GPU_ENABLE` allows ranks to share a GPU.
    pub shares_gpu: bool,
    /// The number of GPUs that the rank's process sees.
    pub gpus: usize,
}

/// The transport of a group's gradients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CollectiveBackend {
    /// NCCL.
    Nccl,
    /// TCP, because all ranks are configured to use it or because they share the only GPU.
    Tcp,
    /// TCP, although the group's machines have several GPUs, between which NCCL is faster. The text
    /// has the obstacle and the remedy.
    Fallback(String),
}

/// Chooses the transport of a group of ranks with these capabilities. It is a pure function of
/// values that all ranks have, so all ranks choose the same.
///
/// Ranks that share a GPU use NCCL if NCCL allows this: each process has its own `NCCL_HOSTID`, or,
/// from version 2.30 on, `NCCL_MULTI_RANK_GPU_ENABLE=1`.
///
/// # Errors
/// A rank requires NCCL, which cannot be used. The message names the rank, the reason and the
/// remedy.
pub fn choose(capabilities: &[Capabilities]) -> Result<CollectiveBackend, String> {
    let Some(obstacle) = obstacle(capabilities) else { return Ok(CollectiveBackend::Nccl) };
    let first = |wanted| capabilities.iter().position(|rank_capabilities| rank_capabilities.wanted == wanted);
    if let Some(rank) = first(Collective::Nccl) {
        return Err(format!("rank {rank} requires the collective nccl, but {obstacle}"));
    }
    let is_automatic = first(Collective::Auto).is_some();
    let has_several_gpus = capabilities
        .iter()
        .any(|rank_capabilities| rank_capabilities.gpus > 1 || rank_capabilities.gpu != capabilities[0].gpu);
    Ok(match is_automatic && has_several_gpus {
        true => CollectiveBackend::Fallback(format!(
            "gradients travel between the GPUs over TCP, which is slower than NCCL: {obstacle}"
        )),
        false => CollectiveBackend::Tcp,
    })
}

/// Exchanges the capabilities of the ranks of `group` and calls [`choose`] with them.
///
/// # Errors
/// A failed peer. [`CollectiveError::NoNccl`] on all ranks if a rank requires NCCL, which cannot be
/// used.
pub fn agree(
    group: &mut Group,
    rank_capabilities: &Capabilities,
) -> Result<CollectiveBackend, CollectiveError> {
    let bytes = serde_json::to_vec(rank_capabilities)
        .map_err(|error| CollectiveError::Argument(error.to_string()))?;
    let gathered = group.all_gather(&bytes)?;
    let mut capabilities = Vec::with_capacity(gathered.len());
    for (rank, bytes) in gathered.iter().enumerate() {
        match serde_json::from_slice(bytes) {
            Ok(rank_capabilities) => capabilities.push(rank_capabilities),
            Err(_) => {
                let failure = PeerFailure::Malformed("invalid capabilities");
                return Err(group.fail_peer(Operation::AllGather, rank, failure));
            }
        }
    }
    choose(&capabilities).map_err(CollectiveError::NoNccl)
}

/// Returns why the ranks cannot use NCCL, and the remedy; `None` if they can.
fn obstacle(capabilities: &[Capabilities]) -> Option<String> {
    if let Some(rank) =
        capabilities.iter().position(|rank_capabilities| rank_capabilities.wanted == Collective::Tcp)
    {
        return Some(format!("rank {rank} has the setting collective = tcp; it must be auto or nccl"));
    }
    let mut versions = Vec::with_capacity(capabilities.len());
    for (rank, rank_capabilities) in capabilities.iter().enumerate() {
        match &rank_capabilities.nccl {
            Ok(version) => versions.push(*version),
            Err(reason) => return Some(format!("rank {rank} cannot use NCCL: {reason}")),
        }
    }
    let first = *versions.first()?;
    if let Some(rank) = versions.iter().position(|version| *version != first) {
        let (first, other) = (NcclVersion(first), NcclVersion(versions[rank]));
        return Some(format!(
            "rank 0 has NCCL {first} and rank {rank} has NCCL {other}; all must have the same version"
        ));
    }
    // NCCL compares the devices of two ranks in the same way.
    let device =
        |rank_capabilities: &Capabilities| (rank_capabilities.gpu.clone(), rank_capabilities.host_id.clone());
    let shared = capabilities.iter().enumerate().find_map(|(rank, rank_capabilities)| {
        let before =
            capabilities[..rank].iter().position(|other| device(other) == device(rank_capabilities))?;
        Some(format!(
            "ranks {before} and {rank} share a GPU; each process must have its own NCCL_HOSTID \
             (loractl run sets it with --collective nccl)"
        ))
    })?;
    if first < SHARED_GPU_VERSION {
        let (least, version) = (NcclVersion(SHARED_GPU_VERSION), NcclVersion(first));
        return Some(format!(
            "{shared}, or NCCL_MULTI_RANK_GPU_ENABLE=1 with NCCL {least} or newer (it is {version})"
        ));
    }
    let rank = capabilities.iter().position(|rank_capabilities| !rank_capabilities.shares_gpu)?;
    Some(format!("{shared}, or NCCL_MULTI_RANK_GPU_ENABLE=1 (rank {rank} does not have it)"))
}

/// A version of NCCL, displayed as `2.28.9`.
struct NcclVersion(u32);

impl fmt::Display for NcclVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(code) = self;
        write!(f, "{}.{}.{}", code / 10_000, code / 100 % 100, code % 100)
    }
}
