//! Micro-batches: rows that are computed at a time, and their tokens as padded matrices.

use lora_spec::{Document, JobSpec, MicroBatch};

use crate::packing::pack;
use crate::{Dataset, TokenRow};

/// Sequences are padded to a multiple of this number of positions.
pub const PAD_MULTIPLE: usize = 16;
/// Number of rows on which models are compared.
pub const SAMPLE_ROWS: usize = 8;
/// Maximum number of inputs of such a row. The logits of a row are in memory at a time.
pub const SAMPLE_TOKENS: usize = 256;

/// The rows of a micro-batch and their padded length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatchRows {
    /// Dataset indices of the samples in each row, the row with the fewest inputs first. A row has
    /// one sample, or several if rows are packed.
    pub rows: Vec<Vec<usize>>,
    /// Positions of a padded row: the inputs of the row with the most, rounded up to a multiple of
    /// 16. A sample has one input less than tokens, because its last token is only a target.
    pub padded_len: usize,
}

impl MicroBatchRows {
    /// Returns the dataset indices of all samples.
    pub fn samples(&self) -> impl Iterator<Item = usize> {
        self.rows.iter().flatten().copied()
    }
}

/// Returns the padded tokens of a micro-batch that was planned for `dataset`: the inputs are the
/// tokens of each sample except the last, the target of an input is the token after it, and its
/// weight is 1 if the target is trained and 0 otherwise.
///
/// # Panics
/// The micro-batch was planned for another dataset: an index or a length does not match.
pub fn collate(dataset: &Dataset, rows: &MicroBatchRows) -> MicroBatch {
    let (batch, seq_len) = (rows.rows.len(), rows.padded_len);
    let mut micro_batch = MicroBatch {
        rows: Vec::with_capacity(batch),
        seq_len,
        tokens: vec![0; batch * seq_len],
        targets: vec![0; batch * seq_len],
        weights: vec![0.0; batch * seq_len],
    };
    for (i, samples) in rows.rows.iter().enumerate() {
        let mut documents = Vec::with_capacity(samples.len());
        let mut start = 0;
        for &sample in samples {
            let row = dataset.rows.row(sample);
            let inputs = inputs(row.len());
            documents.push(Document { sample: sample as u64, start, tokens: row.len() });
            let at = i * seq_len + start..i * seq_len + start + inputs;
            let next = row.tokens().zip(row.trained()).skip(1);
            for (at, (token, (target, trained))) in at.zip(row.tokens().zip(next)) {
                micro_batch.tokens[at] = token;
                micro_batch.targets[at] = target;
                micro_batch.weights[at] = weight(trained);
            }
            start += inputs;
        }
        micro_batch.rows.push(documents);
    }
    micro_batch
}

fn weight(trained: bool) -> f32 {
    if trained { 1.0 } else { 0.0 }
}

/// The number of inputs of a sample: its last token is only a target.
pub(crate) fn inputs(tokens: usize) -> usize {
    tokens.saturating_sub(1)
}

/// Returns micro-batches of the first rows of `dataset`, for comparing models: at most
/// [`SAMPLE_ROWS`] micro-batches of one row each, with at most [`SAMPLE_TOKENS`] inputs, without
/// padding.
pub fn sample_rows(dataset: &Dataset) -> Vec<MicroBatch> {
    let sample = |(index, row): (usize, TokenRow)| {
        let inputs = inputs(row.len()).min(SAMPLE_TOKENS);
        MicroBatch {
            rows: Document::whole_rows([index as u64], inputs + 1),
            seq_len: inputs,
            tokens: row.tokens().take(inputs).collect(),
            targets: row.tokens().skip(1).take(inputs).collect(),
            weights: row.trained().skip(1).take(inputs).map(weight).collect(),
        }
    };
    let rows = dataset.rows.iter().enumerate().filter(|(_, row)| row.len() > 1);
    rows.take(SAMPLE_ROWS).map(sample).collect()
}

/// How the samples of a step become the rows of micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowLayout {
    /// Rows of a micro-batch; at least 1.
    pub micro_batch_size: usize,
    /// Maximum number of inputs of a row of several samples; `None`: each row has one sample.
    pub packed_len: Option<usize>,
}

impl RowLayout {
    /// Returns the layout of the job's rows.
    pub fn for_job(job: &JobSpec) -> Self {
        Self {
            micro_batch_size: job.training.micro_batch_size.max(1),
            packed_len: job.data.packing.then_some(job.data.max_length),
        }
    }

    /// Returns micro-batches for evaluation, which contain each sample once. The samples are
    /// divided like those of a step. `lengths` are in tokens, by dataset index.
    pub fn eval_micro_batches(&self, lengths: &[usize]) -> Vec<MicroBatchRows> {
        self.micro_batches((0..lengths.len()).collect(), lengths)
    }

    /// Divides samples into micro-batches. The rows are sorted by length, then by their first
    /// sample, so that a micro-batch needs little padding.
    ///
    /// The micro-batches are then put in van der Corput order, which is the order of the reversed
    /// bits of their indices. A worker computes a contiguous range of them, and in this order every
    /// such range has short and long ones.
    pub(crate) fn micro_batches(&self, samples: Vec<usize>, lengths: &[usize]) -> Vec<MicroBatchRows> {
        let mut rows = match self.packed_len {
            Some(packed_len) => pack(samples, lengths, packed_len),
            None => samples.into_iter().map(|sample| vec![sample]).collect(),
        };
        let inputs_of = |row: &[usize]| row.iter().map(|sample| inputs(lengths[*sample])).sum::<usize>();
        rows.sort_by_cached_key(|row| (inputs_of(row), row[0]));
        let micro_batches = rows.chunks(self.micro_batch_size).map(|rows| {
            let most = rows.last().map_or(0, |row| inputs_of(row));
            MicroBatchRows { rows: rows.to_vec(), padded_len: most.max(1).next_multiple_of(PAD_MULTIPLE) }
        });
        let mut indexed: Vec<_> = micro_batches.enumerate().collect();
        indexed.sort_by_key(|(index, _)| index.reverse_bits());
        indexed.into_iter().map(|(_, micro_batch)| micro_batch).collect()
    }
}
