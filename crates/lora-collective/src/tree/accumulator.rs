//! Incremental sums over the leaves of a rank.

use std::ops::Range;

use super::{NodeId, TreeError};

/// Adds the vectors of a contiguous range of leaves, pushed in order, into the largest nodes inside
/// the range, like a binary counter over absolute leaf numbers. The caller defines the type of a
/// vector and the addition. At most one vector per level of the tree is kept, in addition to the
/// vector that is being filled. Vectors are reused from step to step.
///
/// ```
/// # use lora_collective::tree::{TreeAccumulator, TreeError};
/// let mut sums = TreeAccumulator::new();
/// sums.start(4, 0..3)?; // leaves 0, 1 and 2 of 4
/// for leaf in 0..3 {
///     let mut gradient = sums.free().unwrap_or_else(|| vec![0.0; 2]);
///     gradient.fill(leaf as f32);
///     sums.push(gradient, |a, b| {
///         a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
///         Ok::<(), TreeError>(())
///     })?;
/// }
/// let nodes = sums.finish()?;
/// assert_eq!(nodes.len(), 2); // leaves 0 + 1, and leaf 2
/// sums.recycle(nodes);
/// # Ok::<(), TreeError>(())
/// ```
#[derive(Debug)]
pub struct TreeAccumulator<V> {
    leaves: usize,
    range: Range<usize>,
    pushed: usize,
    nodes: Vec<(NodeId, V)>,
    free: Vec<V>,
}

impl<V> Default for TreeAccumulator<V> {
    fn default() -> Self {
        Self { leaves: 0, range: 0..0, pushed: 0, nodes: Vec::new(), free: Vec::new() }
    }
}

impl<V> TreeAccumulator<V> {
    /// Creates an empty accumulator.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins a step of `leaves` leaves, of which the caller pushes `range`. The vectors of an
    /// unfinished step are recycled.
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

    /// Returns a recycled vector with its old contents, if there is one.
    pub fn free(&mut self) -> Option<V> {
        self.free.pop()
    }

    /// The pending sums, newest first.
    pub fn pending(&self) -> impl Iterator<Item = &V> {
        self.nodes.iter().rev().map(|(_, vector)| vector)
    }

    /// The number of [pending](Self::pending) sums that the next leaf will be merged with: it is
    /// added to the newest one, the result to the one before it, and so on. 0 after the last leaf
    /// of the range.
    pub fn merges(&self) -> usize {
        let (index, last) = self.next();
        let mut node = NodeId { level: 0, index };
        let siblings = self.nodes.iter().rev().take_while(|(left, _)| {
            let merge = are_siblings(*left, node, last);
            node = parent(*left);
            merge
        });
        if self.pushed < self.range.len() { siblings.count() } else { 0 }
    }

    /// Adds the next leaf of the range. `add(a, b)` adds the right sibling `b` to the left sibling
    /// `a`.
    ///
    /// # Errors
    /// [`TreeError::Count`] past the end of the range, and the errors of `add`. After an error the
    /// step cannot be used.
    pub fn push<E: From<TreeError>>(
        &mut self,
        leaf: V,
        mut add: impl FnMut(&mut V, &V) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.pushed == self.range.len() {
            return Err(TreeError::Count { range: self.range.clone(), got: self.pushed + 1 }.into());
        }
        let (index, last) = self.next();
        let (mut node, mut vector) = (NodeId { level: 0, index }, leaf);
        while let Some((left, mut sum)) = self.nodes.pop_if(|(left, _)| are_siblings(*left, node, last)) {
            add(&mut sum, &vector)?;
            self.free.push(vector);
            (node, vector) = (parent(left), sum);
        }
        self.nodes.push((node, vector));
        self.pushed += 1;
        Ok(())
    }

    /// Ends the step and returns the nodes of the range with their vectors, in the order of
    /// [`super::nodes_in`].
    ///
    /// # Errors
    /// [`TreeError::Count`] if leaves of the range are missing.
    pub fn finish(&mut self) -> Result<Vec<(NodeId, V)>, TreeError> {
        if self.pushed != self.range.len() {
            return Err(TreeError::Count { range: self.range.clone(), got: self.pushed });
        }
        (self.range, self.pushed) = (0..0, 0);
        Ok(std::mem::take(&mut self.nodes))
    }

    /// Keeps the vectors of `nodes`, which [`Self::finish`] returned, for the next step.
    pub fn recycle(&mut self, nodes: Vec<(NodeId, V)>) {
        self.free.extend(nodes.into_iter().map(|(_, vector)| vector));
    }

    /// The number of the next leaf, and whether it is the last of all leaves.
    fn next(&self) -> (usize, bool) {
        let index = self.range.start + self.pushed;
        (index, index + 1 == self.leaves)
    }
}

/// Returns the parent of a left child.
fn parent(left: NodeId) -> NodeId {
    NodeId { level: left.level + 1, index: left.index / 2 }
}

/// Returns whether `right`, which begins where `left` ends, is the right sibling of `left`. If
/// `right` ends with the `last` leaf, it also stands for its ancestors of which it is the leftmost
/// descendant, because the tree is empty beyond the last leaf.
fn are_siblings(left: NodeId, right: NodeId, last: bool) -> bool {
    let Some(climb) = left.level.checked_sub(right.level) else { return false };
    (climb == 0 || last) && left.index.is_multiple_of(2) && right.index >> climb == left.index + 1
}
