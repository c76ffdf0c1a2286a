//! Sizes of the engine's buffers, which the plan of a job's memory uses too.

/// Number of f32 logits that the loss computes at a time on the CPU (48 MiB), at least one row.
pub const CPU_LOGITS_PER_CHUNK: usize = 12 << 20;

/// Number of f32 logits that the loss computes at a time on a GPU (256 MiB), at least one row.
pub const GPU_LOGITS_PER_CHUNK: usize = 64 << 20;

/// Number of elements that a product on the CPU widens or dequantizes to f32 at a time (4 MiB), for
/// weights that are not f32.
pub const CPU_PANEL_ELEMENTS: usize = 1 << 20;

/// Bytes of a quantized weight that a product dequantizes at a time on a GPU (256 MiB), or
/// [`GPU_PANEL_ROW_ALIGNMENT`] rows if those take more. Every weight of a 7B or 8B model is then
/// one panel in bf16: one product a weight, and an input gradient that is rounded to bf16 once. The
/// panel of Llama-3.1-8B takes 117 MB; the saved inputs of a row of 2048 tokens take 537 MB.
pub const GPU_PANEL_BYTES: usize = 256 << 20;

/// On a GPU, panels start at multiples of this many rows, so that the operands of a panel's product
/// start at multiples of 16 bytes. cuBLAS has its fast kernels for such addresses only.
pub const GPU_PANEL_ROW_ALIGNMENT: usize = 256;

/// Bytes of cuBLAS's workspace, as NVIDIA recommends for Hopper. The size is the same on every GPU,
/// so that cuBLAS chooses the same algorithms.
pub const GPU_WORKSPACE_BYTES: usize = 32 << 20;

/// Elements of an 8-bit moment that share a maximum.
pub const EIGHT_BIT_BLOCK_SIZE: usize = 256;

/// Smallest number of elements of a tensor whose moments are in 8 bits. The moments of smaller
/// tensors are f32.
pub const EIGHT_BIT_MIN_ELEMENTS: usize = 4096;

/// Number of weights that are decomposed at a time to initialize an adapter.
pub const MAX_CONCURRENT_DECOMPOSITIONS: usize = 4;

/// Largest heads whose attention a GPU computes on tensor cores, in features.
pub const MAX_MMA_HEAD_DIM: usize = 256;

/// Elements of each paged moment that are on a GPU at a time, in two halves (32 MiB for both
/// moments in f32, 8 MiB in 8 bits).
pub const PAGED_WINDOW_ELEMENTS: usize = 1 << 22;

/// Returns the number of rows of a chunk of logits `[rows, vocab]`. A chunk has at most `budget`
/// logits, or one row if a row has more. All chunks are about equally long.
pub fn chunk_rows(rows: usize, vocab: usize, budget: usize) -> usize {
    let most = (budget / vocab.max(1)).max(1);
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

/// Returns the number of rows of the panels in which a product on a GPU dequantizes a weight
/// `[rows, cols]` to elements of `width` bytes; the last panel may have fewer. These are all rows
/// if they fit [`GPU_PANEL_BYTES`], otherwise a multiple of [`GPU_PANEL_ROW_ALIGNMENT`] such that
/// the panels are about equally high.
pub fn gpu_panel_rows(rows: usize, cols: usize, width: usize) -> usize {
    let fitting = GPU_PANEL_BYTES / (cols * width).max(1);
    if rows <= fitting {
        return rows.max(1);
    }
    let most = (fitting / GPU_PANEL_ROW_ALIGNMENT).max(1) * GPU_PANEL_ROW_ALIGNMENT;
    rows.div_ceil(rows.div_ceil(most)).next_multiple_of(GPU_PANEL_ROW_ALIGNMENT).min(rows)
}
