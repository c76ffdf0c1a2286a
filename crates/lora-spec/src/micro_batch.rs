//! Micro-batches: the tokens that one pass over the model computes.

/// The tokens of some rows. Matrices are `[rows, seq_len]`, row-major, and padded on the right. A
/// padding position has weight 0, and no other position attends to it.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// Dataset index of each row, which is the key of its random numbers.
    pub rows: Vec<u64>,
    /// Positions of a row.
    pub seq_len: usize,
    /// Input tokens.
    pub tokens: Vec<u32>,
    /// The target token of each position.
    pub targets: Vec<u32>,
    /// The weight of each position's loss; 0: the position has no target.
    pub weights: Vec<f32>,
}
