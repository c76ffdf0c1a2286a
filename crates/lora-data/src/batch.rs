//! Micro-batches: rows that are computed at a time, and their tokens as padded matrices.

use lora_spec::MicroBatch;

use crate::{Dataset, Row};

/// Sequences are padded to a multiple of this number of positions.
pub const PAD_MULTIPLE: usize = 16;
/// Number of rows on which models are compared.
pub const SAMPLE_ROWS: usize = 8;
/// Maximum number of inputs of such a row. The logits of a row are in memory at a time.
pub const SAMPLE_TOKENS: usize = 256;

/// The rows of a micro-batch and their padded length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatchRows {
    /// Dataset indices, shortest row first.
    pub rows: Vec<usize>,
    /// Positions of a padded row: the number of inputs of the longest row, rounded up to a
    /// multiple of 16. A row has one input less than tokens, because its last token is only a
    /// target.
    pub padded_len: usize,
}

/// Returns the padded tokens of a micro-batch that was planned for `dataset`: the inputs are the
/// tokens of each row except the last, the target of an input is the token after it, and its weight
/// is 1 if the target is trained and 0 otherwise.
///
/// # Panics
/// The micro-batch was planned for another dataset: an index or a length does not match.
pub fn collate(dataset: &Dataset, rows: &MicroBatchRows) -> MicroBatch {
    let (batch, seq_len) = (rows.rows.len(), rows.padded_len);
    let mut micro_batch = MicroBatch {
        rows: rows.rows.iter().map(|&row| row as u64).collect(),
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

/// Returns micro-batches of the first rows of `dataset`, for comparing models: at most
/// [`SAMPLE_ROWS`] micro-batches of one row each, with at most [`SAMPLE_TOKENS`] inputs, without
/// padding.
pub fn sample_rows(dataset: &Dataset) -> Vec<MicroBatch> {
    let sample = |(index, row): (usize, &Row)| {
        let inputs = row.tokens.len().saturating_sub(1).min(SAMPLE_TOKENS);
        let weights = row.trained[1..=inputs].iter().map(|trained| if *trained { 1.0 } else { 0.0 });
        MicroBatch {
            rows: vec![index as u64],
            seq_len: inputs,
            tokens: row.tokens[..inputs].to_vec(),
            targets: row.tokens[1..=inputs].to_vec(),
            weights: weights.collect(),
        }
    };
    let rows = dataset.rows.iter().enumerate().filter(|(_, row)| row.tokens.len() > 1);
    rows.take(SAMPLE_ROWS).map(sample).collect()
}

/// Returns micro-batches for evaluation, which contain each row once. The rows are divided like
/// those of a step. `lengths` are in tokens, by dataset index.
pub fn eval_micro_batches(lengths: &[usize], micro_batch_size: usize) -> Vec<MicroBatchRows> {
    into_micro_batches((0..lengths.len()).collect(), lengths, micro_batch_size.max(1))
}

/// Divides rows into micro-batches. The rows are sorted by length, then index, so that a
/// micro-batch needs little padding.
///
/// The micro-batches are then put in van der Corput order, which is the order of the reversed bits
/// of their indices. A worker computes a contiguous range of them, and in this order every such
/// range has short and long ones.
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
    let mut indexed: Vec<_> = micro_batches.enumerate().collect();
    indexed.sort_by_key(|(index, _)| index.reverse_bits());
    indexed.into_iter().map(|(_, micro_batch)| micro_batch).collect()
}
