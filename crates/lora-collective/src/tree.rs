//! The canonical summation tree: one order of addition for `M` leaves, independent of their owners.
//!
//! `node(0, k)` is leaf `k`, and `node(j, k) = node(j-1, 2k) + node(j-1, 2k+1)`. If the right child
//! starts at or beyond `M`, the node *is* its left child and nothing is added. The root is the sum
//! of all leaves. Floating-point addition is not associative, so sums have the same bits only if
//! they use the same tree. This tree depends only on `M`. (Pairwise summation; see N. J. Higham,
//! "The accuracy of floating point summation", 1993.)

mod accumulator;
mod partition;

use std::ops::Range;

pub use accumulator::TreeAccumulator;
pub use partition::{all_reduce_bytes, partition};

/// A node of the tree. It covers those of the leaves `index << level..(index + 1) << level` that
/// exist. A node that is its left child has the id of that child, so ids are unique.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId {
    /// Height above the leaves.
    pub level: u32,
    /// Position among the nodes of the level.
    pub index: usize,
}

/// Invalid arguments to a function of the tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// There are no leaves, or no ranks.
    #[error("invalid partition: {leaves} leaves on {ranks} ranks; both numbers must be at least 1")]
    Partition {
        /// Number of leaves.
        leaves: usize,
        /// Number of ranks.
        ranks: usize,
    },
    /// A range ends past the last leaf.
    #[error("the range {range:?} is not a part of {leaves} leaves")]
    Range {
        /// The range.
        range: Range<usize>,
        /// Number of leaves.
        leaves: usize,
    },
    /// More leaves were pushed than the range has, or fewer.
    #[error("{got} leaves were pushed, but the range {range:?} has another number of leaves")]
    Count {
        /// The accumulator's range.
        range: Range<usize>,
        /// The number of leaves that were pushed.
        got: usize,
    },
    /// The nodes do not cover the tree.
    #[error("the nodes are not an ordered cover of {leaves} leaves: wrong at leaf {leaf}")]
    Cover {
        /// Number of leaves.
        leaves: usize,
        /// The first leaf that is missing, or the number of leaves if there are too many nodes.
        leaf: usize,
    },
}

/// Returns the largest nodes inside `range` of `leaves` leaves, in order. A rank that owns the
/// range sends these nodes.
///
/// # Errors
/// [`TreeError::Range`] for a range that ends past the last leaf.
pub fn nodes_in(leaves: usize, range: &Range<usize>) -> Result<Vec<NodeId>, TreeError> {
    if range.start > range.end || range.end > leaves {
        return Err(TreeError::Range { range: range.clone(), leaves });
    }
    if range.is_empty() {
        return Ok(Vec::new());
    }
    Ok(largest_nodes(leaves, range).collect())
}

/// Returns the additions that sum `nodes`, an ordered cover of all leaves, up to the root. A pair
/// `(a, b)` adds vector `b` to vector `a`, where `a` and `b` are positions in `nodes`. The
/// additions must be done in this order. The sum is then at position 0.
///
/// # Errors
/// [`TreeError::Cover`] if the nodes are not a cover in leaf order.
pub fn merge_order(leaves: usize, nodes: &[NodeId]) -> Result<Vec<(usize, usize)>, TreeError> {
    let mut walk = Walk { leaves, nodes, next: 0, order: Vec::new() };
    walk.visit(root(leaves))?;
    if walk.next < nodes.len() {
        return Err(TreeError::Cover { leaves, leaf: leaves });
    }
    Ok(walk.order)
}

/// Performs the additions of `order`, from [`merge_order`], on `vectors`: the concatenated vectors
/// of the nodes, `len` elements each. The sum is then in the first `len` elements.
///
/// # Panics
/// If `vectors` is shorter than the order needs.
pub fn combine(order: &[(usize, usize)], vectors: &mut [f32], len: usize) {
    for &(left, right) in order {
        let (head, tail) = vectors.split_at_mut(right * len);
        add(&mut head[left * len..(left + 1) * len], &tail[..len]);
    }
}

/// Returns the sum of one scalar per leaf (losses, weights) in tree order. Without leaves it is 0.
pub fn sum_f64(leaves: &[f64]) -> f64 {
    match leaves {
        [] => 0.0,
        [leaf] => *leaf,
        _ => {
            let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
            sum_f64(left) + sum_f64(right)
        }
    }
}

fn add(left: &mut [f32], right: &[f32]) {
    for (a, b) in left.iter_mut().zip(right) {
        *a += *b;
    }
}

fn root(leaves: usize) -> NodeId {
    NodeId { level: leaves.next_power_of_two().ilog2(), index: 0 }
}

/// [`nodes_in`] for a valid range.
fn largest_nodes(leaves: usize, range: &Range<usize>) -> impl Iterator<Item = NodeId> + use<> {
    let Range { mut start, end } = range.clone();
    // The tree is empty beyond the last leaf, so a range that ends at the last leaf may be extended
    // to the end of the root.
    let limit = if end == leaves { leaves.next_power_of_two() } else { end };
    std::iter::from_fn(move || {
        if start >= end {
            return None;
        }
        let level = start.trailing_zeros().min((limit - start).ilog2());
        let node = canonical(leaves, NodeId { level, index: start >> level });
        start += 1 << level;
        Some(node)
    })
}

fn right_child_start(node: NodeId) -> usize {
    (2 * node.index + 1) << (node.level - 1)
}

fn canonical(leaves: usize, mut node: NodeId) -> NodeId {
    while node.level > 0 && right_child_start(node) >= leaves {
        node = NodeId { level: node.level - 1, index: 2 * node.index };
    }
    node
}

struct Walk<'a> {
    leaves: usize,
    nodes: &'a [NodeId],
    next: usize,
    order: Vec<(usize, usize)>,
}

impl Walk<'_> {
    /// Returns the position of the vector that is `node` after the additions of `order` so far.
    fn visit(&mut self, node: NodeId) -> Result<usize, TreeError> {
        let node = canonical(self.leaves, node);
        if self.nodes.get(self.next) == Some(&node) {
            self.next += 1;
            return Ok(self.next - 1);
        }
        let Some(level) = node.level.checked_sub(1) else {
            return Err(TreeError::Cover { leaves: self.leaves, leaf: node.index });
        };
        let left = self.visit(NodeId { level, index: 2 * node.index })?;
        let right = self.visit(NodeId { level, index: 2 * node.index + 1 })?;
        self.order.push((left, right));
        Ok(left)
    }
}
