//! How kernels share out rows: in runs of 16 bytes, as `rows.cuh` has them.

use candle_core::DType;

/// The most threads of a block that works on a row.
const THREADS: usize = 256;

/// Runs of 16 bytes in `features` elements, the last one perhaps not whole.
pub(crate) fn runs(features: usize, dtype: DType) -> usize {
    features.div_ceil(16 / dtype.size_in_bytes())
}

/// Threads of a block for a row of so many runs: whole warps.
pub(crate) fn row_threads(runs: usize) -> u32 {
    runs.next_multiple_of(32).clamp(32, THREADS) as u32
}

/// Blocks, and threads of each, where every run of every row has its own thread: x counts rows.
pub(crate) fn row_grid(rows: usize, runs: usize) -> ((usize, usize, usize), u32) {
    let threads = row_threads(runs);
    ((rows, runs.div_ceil(threads as usize), 1), threads)
}
