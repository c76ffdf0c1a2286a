//! Adding up a rank's leaves as they come.

use std::ops::Range;

use super::{NodeId, TreeError, add};

/// Adds the vectors of a contiguous range of leaves, pushed in order, into the largest nodes inside the range: a
/// binary counter over absolute leaf numbers. At no time does it hold more than one vector a level of the tree beside
/// the one being filled, and vectors are used again from step to step.
///
/// ```
/// # use lora_collective::tree::TreeAccumulator;
/// let mut sums = TreeAccumulator::new(2);
/// sums.start(4, 0..3)?; // leaves 0, 1 and 2 of 4
/// for leaf in 0..3 {
///     let mut gradient = sums.buffer();
///     gradient.fill(leaf as f32);
///     sums.push(gradient)?;
/// }
/// let nodes = sums.finish()?;
/// assert_eq!(nodes.len(), 2); // leaves 0 + 1, and leaf 2
/// sums.recycle(nodes);
/// # Ok::<(), lora_collective::tree::TreeError>(())
/// ```
#[derive(Debug)]
pub struct TreeAccumulator {
    len: usize,
    leaves: usize,
    range: Range<usize>,
    pushed: usize,
    nodes: Vec<(NodeId, Vec<f32>)>,
    free: Vec<Vec<f32>>,
}

impl TreeAccumulator {
    /// An accumulator for vectors of `len` elements.
    pub fn new(len: usize) -> Self {
        Self { len, leaves: 0, range: 0..0, pushed: 0, nodes: Vec::new(), free: Vec::new() }
    }

    /// Begins a step of `leaves` leaves of which `range` will be pushed. What an unfinished step left is dropped.
    ///
    /// # Errors
    /// [`TreeError::Range`] for a range that ends past the last leaf.
    pub fn start(&mut self, leaves: usize, range: Range<usize>) -> Result<(), TreeError> {
        if range.start > range.end || range.end > leaves {
            return Err(TreeError::Range { range, leaves });
        }
        let unfinished = std::mem::take(&mut self.nodes);
        self.recycle(unfinished);
        (self.leaves, self.range, self.pushed) = (leaves, range, 0);
        Ok(())
    }

    /// A vector of zeros for the next leaf; one that was used before where there is one.
    pub fn buffer(&mut self) -> Vec<f32> {
        match self.free.pop() {
            Some(mut vector) => {
                vector.fill(0.0);
                vector
            }
            None => vec![0.0; self.len],
        }
    }

    /// Adds the next leaf of the range, a vector from [`Self::buffer`].
    ///
    /// # Errors
    /// [`TreeError::Length`] for a vector of another length, [`TreeError::Count`] past the end of the range.
    pub fn push(&mut self, leaf: Vec<f32>) -> Result<(), TreeError> {
        if leaf.len() != self.len {
            return Err(TreeError::Length { expected: self.len, got: leaf.len() });
        }
        if self.pushed == self.range.len() {
            return Err(TreeError::Count { range: self.range.clone(), got: self.pushed + 1 });
        }
        let index = self.range.start + self.pushed;
        self.pushed += 1;
        let last = index + 1 == self.leaves;
        let (mut node, mut vector) = (NodeId { level: 0, index }, leaf);
        while let Some((left, mut sum)) = self.nodes.pop_if(|(left, _)| are_siblings(*left, node, last)) {
            add(&mut sum, &vector);
            self.free.push(vector);
            (node, vector) = (NodeId { level: left.level + 1, index: left.index / 2 }, sum);
        }
        self.nodes.push((node, vector));
        Ok(())
    }

    /// The nodes of the range with their vectors, as [`super::nodes_in`] lists them.
    ///
    /// # Errors
    /// [`TreeError::Count`] where leaves of the range are still to come.
    pub fn finish(&mut self) -> Result<Vec<(NodeId, Vec<f32>)>, TreeError> {
        if self.pushed != self.range.len() {
            return Err(TreeError::Count { range: self.range.clone(), got: self.pushed });
        }
        (self.range, self.pushed) = (0..0, 0);
        Ok(std::mem::take(&mut self.nodes))
    }

    /// Takes back the vectors of [`Self::finish`] for the next step.
    pub fn recycle(&mut self, nodes: Vec<(NodeId, Vec<f32>)>) {
        let len = self.len;
        self.free.extend(nodes.into_iter().map(|(_, vector)| vector).filter(|vector| vector.len() == len));
    }
}

/// Whether `right`, which begins where `left` ends, is its right sibling. Past the `last` leaf there is nothing, so
/// there `right` also stands for the higher nodes of which it is the left child.
fn are_siblings(left: NodeId, right: NodeId, last: bool) -> bool {
    let Some(climb) = left.level.checked_sub(right.level) else { return false };
    (climb == 0 || last) && left.index.is_multiple_of(2) && right.index >> climb == left.index + 1
}
