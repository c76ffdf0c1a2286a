//! Leaves to sum, and their expected sums.

use std::ops::Range;

use lora_collective::tree::{NodeId, TreeAccumulator, TreeError, combine, merge_order, nodes_in};

/// Returns values of very different magnitudes, so that another order of addition gives other bits.
pub(crate) fn leaf(index: usize, elements: usize) -> Vec<f32> {
    let mut state = index as u32 * 7919 + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    (0..elements).map(|_| (next() as f32 - 8e6) * 2f32.powi(next() as i32 % 20 - 10)).collect()
}

/// Returns the nodes of a rank that owns `range`.
pub(crate) fn nodes_of(leaves: usize, range: Range<usize>, elements: usize) -> Vec<(NodeId, Vec<f32>)> {
    let mut sums = TreeAccumulator::new();
    sums.start(leaves, range.clone()).unwrap();
    for k in range {
        let add = |a: &mut Vec<f32>, b: &Vec<f32>| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            Ok::<(), TreeError>(())
        };
        sums.push(leaf(k, elements), add).unwrap();
    }
    sums.finish().unwrap()
}

/// Returns the sum over the whole tree, computed without ranks.
pub(crate) fn serial_sum(leaves: usize, elements: usize) -> Vec<f32> {
    let ids: Vec<_> = (0..leaves).flat_map(|k| nodes_in(leaves, &(k..k + 1)).unwrap()).collect();
    let mut vectors: Vec<f32> = (0..leaves).flat_map(|k| leaf(k, elements)).collect();
    combine(&merge_order(leaves, &ids).unwrap(), &mut vectors, elements);
    vectors.truncate(elements);
    vectors
}
