//! The description of a group.

use std::fmt;
use std::time::Duration;

use crate::error::CollectiveError;

/// The maximum length of a token and of a job name, in bytes.
pub(crate) const MAX_NAME_BYTES: usize = 256;

/// The description of a group. All fields except `rank` are equal on all ranks.
#[derive(Clone)]
pub struct GroupSpec {
    /// The job's name, at most 256 bytes.
    pub job: String,
    /// The fencing number. Peers of an older generation are refused.
    pub generation: u64,
    /// This rank.
    pub rank: usize,
    /// The address of each rank's [`PeerListener`](crate::PeerListener), `host:port`, by rank.
    pub peers: Vec<String>,
    /// The secret that all members share, at most 256 bytes.
    pub token: String,
    /// The time limit of the formation.
    pub form_timeout: Duration,
    /// How long an operation may wait without progress.
    pub timeout: Duration,
}

impl GroupSpec {
    /// Checks the rank, the lengths of the names and the timeouts.
    ///
    /// # Errors
    /// [`CollectiveError::Argument`] for the first invalid field.
    pub(crate) fn check(&self) -> Result<(), CollectiveError> {
        let problem = if self.rank >= self.peers.len() {
            format!("rank {} in a group of {} ranks", self.rank, self.peers.len())
        } else if self.job.len() > MAX_NAME_BYTES {
            format!("a job name of {} bytes, the limit is {MAX_NAME_BYTES}", self.job.len())
        } else if self.token.len() > MAX_NAME_BYTES {
            format!("a token of {} bytes, the limit is {MAX_NAME_BYTES}", self.token.len())
        } else if self.timeout.is_zero() || self.form_timeout.is_zero() {
            "a timeout of zero".to_owned()
        } else {
            return Ok(());
        };
        Err(CollectiveError::Argument(problem))
    }
}

impl fmt::Debug for GroupSpec {
    /// Omits the token.
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
