//! Micro-batches: rows that are computed together, and their tokens as padded matrices.

use crate::Dataset;

/// Sequences are padded to a multiple of this.
pub(crate) const PAD_MULTIPLE: usize = 16;

/// The rows of a micro-batch and the shape they are computed in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatchRows {
    /// Dataset indices, shortest row first.
    pub rows: Vec<usize>,
    /// Positions of a padded row: inputs of the longest one, which are a token fewer than the row has (its last token is
    /// only predicted), rounded up to 16.
    pub padded_len: usize,
}

/// A micro-batch's tokens. Matrices are `[batch, seq_len]`, row-major, padded with 0 at the right.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// Dataset index of each row: the key of its random numbers.
    pub rows: Vec<u64>,
    /// Rows.
    pub batch: usize,
    /// Positions a row.
    pub seq_len: usize,
    /// Inputs: each row's tokens but the last.
    pub tokens: Vec<u32>,
    /// The token after each input.
    pub targets: Vec<u32>,
    /// 1 where the target is trained, 0 elsewhere.
    pub weights: Vec<f32>,
}

/// Lays out the tokens of a micro-batch that was planned for this dataset.
///
/// # Panics
/// If it was planned for another one (an index or a length that does not fit).
pub fn collate(dataset: &Dataset, rows: &MicroBatchRows) -> MicroBatch {
    let (batch, seq_len) = (rows.rows.len(), rows.padded_len);
    let mut micro_batch = MicroBatch {
        rows: rows.rows.iter().map(|&row| row as u64).collect(),
        batch,
        seq_len,
        tokens: vec![0; batch * seq_len],
        targets: vec![0; batch * seq_len],
        weights: vec![0.0; batch * seq_len],
    };
    for (i, &index) in rows.rows.iter().enumerate() {
        let row = &dataset.rows[index];
        let inputs = row.tokens.len().saturating_sub(1);
        let at = i * seq_len..i * seq_len + inputs;
        micro_batch.tokens[at.clone()].copy_from_slice(&row.tokens[..inputs]);
        micro_batch.targets[at.clone()].copy_from_slice(&row.tokens[row.tokens.len() - inputs..]);
        for (weight, &trained) in micro_batch.weights[at].iter_mut().zip(row.trained.iter().skip(1)) {
            *weight = if trained { 1.0 } else { 0.0 };
        }
    }
    micro_batch
}

/// All rows once, for evaluation, dealt like those of a step. `lengths` are in tokens, by dataset index.
pub fn eval_micro_batches(lengths: &[usize], micro_batch_size: usize) -> Vec<MicroBatchRows> {
    into_micro_batches((0..lengths.len()).collect(), lengths, micro_batch_size.max(1))
}

/// Deals rows into micro-batches: sorted by length (then index), so that rows of a micro-batch need little padding.
///
/// The micro-batches are then put in van der Corput order (by the reversed bits of their rank), so that every contiguous range
/// of them, which is what a worker computes, holds short and long ones alike.
pub(crate) fn into_micro_batches(
    mut rows: Vec<usize>,
    lengths: &[usize],
    micro_batch_size: usize,
) -> Vec<MicroBatchRows> {
    rows.sort_unstable_by_key(|&row| (lengths[row], row));
    let micro_batches = rows.chunks(micro_batch_size).map(|rows| {
        let longest = rows.last().map_or(0, |&row| lengths[row]);
        let inputs = longest.saturating_sub(1).max(1);
        MicroBatchRows { rows: rows.to_vec(), padded_len: inputs.next_multiple_of(PAD_MULTIPLE) }
    });
    let mut ranked: Vec<_> = micro_batches.enumerate().collect();
    ranked.sort_by_key(|(rank, _)| rank.reverse_bits());
    ranked.into_iter().map(|(_, micro_batch)| micro_batch).collect()
}
