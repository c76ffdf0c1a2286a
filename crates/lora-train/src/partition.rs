//! The division of a step's micro-batches among the ranks.

use std::ops::Range;

use lora_collective::tree::{TreeError, partition};

/// The micro-batches that each rank computes in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Number of micro-batches of the step.
    pub(crate) leaves: usize,
    /// The micro-batches of each rank, by rank.
    pub(crate) ranges: Vec<Range<usize>>,
}

impl Partition {
    /// Divides `leaves` micro-batches among `ranks` ranks; see
    /// [`lora_collective::tree::partition`].
    ///
    /// # Errors
    /// There are no micro-batches or no ranks.
    pub fn new(leaves: usize, ranks: usize) -> Result<Self, TreeError> {
        Ok(Self { leaves, ranges: partition(leaves, ranks)? })
    }

    /// Returns the micro-batches of `rank`.
    pub(crate) fn range(&self, rank: usize) -> Range<usize> {
        self.ranges[rank].clone()
    }
}
