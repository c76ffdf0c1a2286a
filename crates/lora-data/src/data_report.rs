//! Statistics of a dataset's rows.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::RowFormat;

/// Statistics of a dataset's rows. Lengths are in tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct DataReport {
    /// Rows in the file.
    pub rows_read: usize,
    /// Rows that are used.
    pub rows_kept: usize,
    /// Rows that were dropped because they are longer than `max_length`.
    pub dropped: usize,
    /// Rows that were dropped because they have no target token.
    pub without_targets: usize,
    /// Rows that were truncated to `max_length`.
    pub truncated: usize,
    /// Tokens of the kept rows.
    pub tokens: u64,
    /// Tokens among them that are targets of the loss.
    pub trained_tokens: u64,
    /// Length of the shortest kept row.
    pub shortest: usize,
    /// Median length: half of the kept rows are at most this long.
    pub median: usize,
    /// 95th percentile of the lengths: 95 % of the kept rows are at most this long.
    pub percentile_95: usize,
    /// Length of the longest kept row.
    pub longest: usize,
    /// Number of rows in the file, by format.
    pub formats: BTreeMap<RowFormat, usize>,
    /// Keys without effect, which are not part of a row's format, and the number of rows that have
    /// them.
    pub ignored_keys: BTreeMap<String, usize>,
}

impl DataReport {
    /// Sets the fields that are computed from the lengths of the kept rows.
    pub(crate) fn set_lengths(&mut self, mut lengths: Vec<usize>) {
        lengths.sort_unstable();
        // Nearest-rank method: the smallest length that at least `percent` % of the rows do not
        // exceed.
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
