use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{DType, Result, Tensor};

use super::{FINGERPRINT_KEYS, SUM_CHUNK};
use crate::cuda::{Arg, Gpu, flat_grid};
use crate::transfer::to_vec;

/// Maximum number of blocks of a fingerprint; each block ends with atomic additions to the same two
/// sums.
const HASH_BLOCKS: usize = 1024;

/// Threads per block of the sums.
const THREADS: u32 = 256;

/// Maximum number of pairs in a launch of [`tree_combine`].
const PAIRS: usize = 64;

/// Returns the sum of squares of each chunk.
pub(super) fn sums_of_squares(gpu: &Gpu, x: &Tensor) -> Result<Vec<f32>> {
    let n = x.elem_count();
    let chunks = n.div_ceil(SUM_CHUNK);
    let partial = gpu.empty(chunks, DType::F32)?;
    let args =
        [gpu.arg(x, DType::F32)?, (n as u64).into(), Arg::size(SUM_CHUNK)?, gpu.arg(&partial, DType::F32)?];
    gpu.launch("reduce_sum_of_squares_f32", (chunks, 1, 1), THREADS, 0, &args)?;
    to_vec(&partial)
}

pub(super) fn scale(gpu: &Gpu, x: &Tensor, factor: f32) -> Result<()> {
    let n = x.elem_count();
    gpu.launch_flat(
        "reduce_scale_f32",
        n,
        &[gpu.arg(x, DType::F32)?.updated(), factor.into(), (n as u64).into()],
    )
}

/// Returns the sums of the elements' hashes; the first element has the index `first`.
pub(super) fn hashes(gpu: &Gpu, parts: &[&Tensor], mut first: u64) -> Result<[u64; 2]> {
    // Two sums of 64 bits, each with its lower half first.
    let sums = gpu.empty(4, DType::U32)?;
    gpu.zero(&sums)?;
    for part in parts {
        let n = part.elem_count() as u64;
        let (dtype, kernel) = match part.dtype() {
            DType::U8 => (DType::U8, "reduce_fingerprint_u8"),
            _ => (DType::F32, "reduce_fingerprint_f32"),
        };
        let args = [
            gpu.arg(part, dtype)?,
            n.into(),
            first.into(),
            FINGERPRINT_KEYS[0].into(),
            FINGERPRINT_KEYS[1].into(),
            gpu.arg(&sums, DType::U32)?,
        ];
        let blocks = part.elem_count().div_ceil(SUM_CHUNK).min(HASH_BLOCKS);
        gpu.launch(kernel, (blocks, 1, 1), THREADS, 0, &args)?;
        first += n;
    }
    let halves = to_vec::<u32>(&sums)?;
    Ok([0, 2].map(|i| u64::from(halves[i]) | u64::from(halves[i + 1]) << 32))
}

/// `Pairs` of reduce.cu.
#[repr(C)]
struct Pairs {
    count: u32,
    pair: [Pair; PAIRS],
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Pair(u32, u32);

/// Computes `vectors[left] += vectors[right]` for each (left, right) in order, on `stream`, in one
/// launch for every 64 pairs.
///
/// `vectors` is the address of contiguous f32 vectors of `elements` each, on the GPU of the stream,
/// which must be open. Nothing else may access the vectors meanwhile.
pub fn tree_combine(
    stream: &Arc<CudaStream>,
    order: &[(usize, usize)],
    vectors: u64,
    elements: usize,
) -> Result<()> {
    let gpu = Gpu::from_stream(stream)?;
    for order in order.chunks(PAIRS) {
        let mut pairs = Pairs { count: order.len() as u32, pair: [Pair(0, 0); PAIRS] };
        for (pair, &(left, right)) in pairs.pair.iter_mut().zip(order) {
            let (Ok(left), Ok(right)) = (u32::try_from(left), u32::try_from(right)) else {
                candle_core::bail!("{left} and {right} are not indices of vectors");
            };
            *pair = Pair(left, right);
        }
        let (mut vectors, mut n) = (vectors, elements as u64);
        let mut args: [*mut c_void; 3] =
            [(&raw mut vectors).cast(), (&raw mut n).cast(), (&raw mut pairs).cast()];
        let (grid, threads) = flat_grid(elements);
        gpu.launch_on(stream, "reduce_tree_combine_f32", grid, threads, 0, &mut args)?;
    }
    Ok(())
}
