//! Micro-batches: the tokens that one pass over the model computes.

/// The tokens of some rows. Matrices are `[rows, seq_len]`, row-major, and padded on the right. A
/// padding position has weight 0, and no other position attends to it.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// The documents in each row, in the order of their positions. A packed row has several.
    pub rows: Vec<Vec<Document>>,
    /// Positions of a row.
    pub seq_len: usize,
    /// Input tokens.
    pub tokens: Vec<u32>,
    /// The target token of each position.
    pub targets: Vec<u32>,
    /// The weight of each position's loss; 0: the position has no target.
    pub weights: Vec<f32>,
}

/// A sample within a row. It ends where the next one starts; the last one has the padding. Its
/// tokens attend only to each other, and their positions are counted from its first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document {
    /// Dataset index of the sample, which is the key of its random numbers.
    pub sample: u64,
    /// Index of its first token in the row.
    pub start: usize,
    /// Number of its tokens, including the last one, which is only a target.
    pub tokens: usize,
}

impl Document {
    /// Returns rows that have one document of `tokens` tokens each: these samples.
    pub fn whole_rows(samples: impl IntoIterator<Item = u64>, tokens: usize) -> Vec<Vec<Self>> {
        samples.into_iter().map(|sample| vec![Self { sample, start: 0, tokens }]).collect()
    }
}

impl MicroBatch {
    /// Returns whether a row has several documents.
    pub fn is_packed(&self) -> bool {
        self.rows.iter().any(|documents| documents.len() > 1)
    }

    /// Returns the number of tokens of the longest document. The frequencies of `dynamic` and
    /// `longrope` depend on it, as in Transformers.
    pub fn longest_document(&self) -> usize {
        self.rows.iter().flatten().map(|document| document.tokens).max().unwrap_or(0)
    }

    /// Returns the document of each position, `[rows * seq_len]`.
    pub fn documents(&self) -> impl Iterator<Item = (usize, Document)> {
        self.rows.iter().flat_map(|documents| {
            let mut next = 0;
            (0..self.seq_len).map(move |position| {
                if documents.get(next + 1).is_some_and(|document| document.start <= position) {
                    next += 1;
                }
                (position, documents[next])
            })
        })
    }
}
