//! NCCL in a build without CUDA. It has the interface of `nccl.rs`, so that its callers do not
//! depend on the build.

use std::convert::Infallible;
use std::ops::Range;
use std::time::Duration;

use crate::backend_choice::{Collective, CollectiveBackend, Preference};
use crate::error::CollectiveError;
use crate::group::Group;
use crate::tree::NodeId;

/// An NCCL communicator. It cannot be created in a build without CUDA.
pub struct NcclGroup {
    never: Infallible,
}

impl NcclGroup {
    /// Returns TCP.
    ///
    /// # Errors
    /// [`CollectiveError::BuiltWithoutCuda`] if this rank requires NCCL.
    pub fn agree(
        _: &mut Group,
        preference: &Preference,
        _gpu_uuid: Option<&str>,
    ) -> Result<CollectiveBackend, CollectiveError> {
        match preference.collective {
            Collective::Nccl => Err(CollectiveError::BuiltWithoutCuda),
            Collective::Auto | Collective::Tcp => Ok(CollectiveBackend::Tcp),
        }
    }

    /// Fails.
    ///
    /// # Errors
    /// [`CollectiveError::BuiltWithoutCuda`].
    pub fn form(_: &mut Group, _gpu: usize, _timeout: Duration) -> Result<Self, CollectiveError> {
        Err(CollectiveError::BuiltWithoutCuda)
    }

    /// Enqueues the sum of one segment.
    ///
    /// # Errors
    /// None: the communicator does not exist.
    pub fn all_reduce(
        &mut self,
        _: &mut Group,
        _leaves: usize,
        _ranges: &[Range<usize>],
        _nodes: &[(NodeId, u64)],
        _out: u64,
        _elements: usize,
    ) -> Result<(), CollectiveError> {
        match self.never {}
    }

    /// Waits until all segments are summed.
    ///
    /// # Errors
    /// None: the communicator does not exist.
    pub fn finish(&mut self, _: &mut Group) -> Result<(), CollectiveError> {
        match self.never {}
    }

    /// Aborts the communicator.
    ///
    /// # Errors
    /// None: the communicator does not exist.
    pub fn leave(self) -> Result<(), CollectiveError> {
        match self.never {}
    }

    /// The number of bytes sent to all peers so far.
    pub fn bytes_sent(&self) -> u64 {
        match self.never {}
    }
}
