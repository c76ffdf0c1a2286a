//! What became of a dataset's rows.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::RowFormat;

/// What became of a dataset's rows. Lengths are in tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct DataReport {
    /// Rows in the file.
    pub rows_read: usize,
    /// Rows that are trained on.
    pub rows_kept: usize,
    /// Rows left out because they are longer than `max_length`.
    pub dropped: usize,
    /// Rows left out because no token of theirs is a target.
    pub without_targets: usize,
    /// Rows cut at `max_length`.
    pub truncated: usize,
    /// Tokens in the rows kept.
    pub tokens: u64,
    /// Tokens among them that are targets of the loss.
    pub trained_tokens: u64,
    /// Length of the shortest row kept.
    pub shortest: usize,
    /// Half of the rows kept are at most this long.
    pub median: usize,
    /// 95 % of the rows kept are at most this long.
    pub percentile_95: usize,
    /// Length of the longest row kept.
    pub longest: usize,
    /// Rows read, by format.
    pub formats: BTreeMap<RowFormat, usize>,
    /// Keys that rows have beside those of their format, and in how many rows: they have no effect.
    pub ignored_keys: BTreeMap<String, usize>,
}

impl DataReport {
    /// Fills in what follows from the lengths of the rows kept.
    pub(crate) fn set_lengths(&mut self, mut lengths: Vec<usize>) {
        lengths.sort_unstable();
        // Nearest rank: the smallest length that at least so many percent of the rows do not exceed.
        let percentile = |percent: usize| {
            let rank = (lengths.len() * percent).div_ceil(100).max(1);
            lengths.get(rank - 1).copied().unwrap_or(0)
        };
        self.shortest = lengths.first().copied().unwrap_or(0);
        self.median = percentile(50);
        self.percentile_95 = percentile(95);
        self.longest = lengths.last().copied().unwrap_or(0);
        self.rows_kept = lengths.len();
        self.tokens = lengths.iter().map(|&length| length as u64).sum();
    }
}
