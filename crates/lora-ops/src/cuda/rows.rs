//! The division of rows among threads, in runs of 16 bytes as in `rows.cuh`.

use candle_core::DType;

/// The largest number of threads of a block that computes a row.
const THREADS: usize = 256;

/// The number of runs of 16 bytes in `features` elements; the last run may be incomplete.
pub(crate) fn runs(features: usize, dtype: DType) -> usize {
    features.div_ceil(16 / dtype.size_in_bytes())
}

/// Threads of a block for a row of `runs` runs: whole warps.
pub(crate) fn row_threads(runs: usize) -> u32 {
    runs.next_multiple_of(32).clamp(32, THREADS) as u32
}

/// The grid and the threads per block for one thread per run of every row; x is the row.
pub(crate) fn row_grid(rows: usize, runs: usize) -> ((usize, usize, usize), u32) {
    let threads = row_threads(runs);
    ((rows, runs.div_ceil(threads as usize), 1), threads)
}
