//! Dequantizing on a GPU.

use candle_core::{DType, Result, Tensor};

use super::{FourBit, Int8, Scales};
use crate::cuda::{Arg, Gpu, row_threads, runs, suffix};

/// Threads per block of the 4-bit kernels, and the number of 16-byte runs that each thread writes
/// (`RUNS` in `quant.cu`).
const FOUR_BIT_LAUNCH: (usize, usize) = (256, 4);

/// Dequantizes the elements of `weight` from `start` on, in row-major order, into all of `out` (f32
/// or bf16).
pub(crate) fn four_bit(gpu: &Gpu, weight: &FourBit, start: usize, out: &Tensor) -> Result<()> {
    let (dtype, n) = (out.dtype(), out.elem_count());
    let none = || Arg::from(0_u64);
    let [scales, map, absmax, offset, nested_shift] = match &weight.scales {
        Scales::Plain(scales) => [
            gpu.arg(scales, DType::F32)?.with_bytes(4 * n / weight.block),
            none(),
            none(),
            0.0_f32.into(),
            0_u32.into(),
        ],
        Scales::Nested { codes, map, absmax, offset, block } => [
            gpu.arg(codes, DType::U8)?.with_bytes(n / weight.block),
            gpu.arg(map, DType::F32)?,
            gpu.arg(absmax, DType::F32)?.with_bytes(4 * n / (weight.block * *block)),
            (*offset).into(),
            block.ilog2().into(),
        ],
    };
    let args = [
        gpu.arg(&weight.codes, DType::U8)?.with_bytes(n / 2),
        gpu.arg(&weight.values, DType::F32)?,
        scales,
        map,
        absmax,
        offset,
        nested_shift,
        weight.block.ilog2().into(),
        (start as u64).into(),
        gpu.arg(out, dtype)?,
        (n as u64).into(),
    ];
    let (threads, runs_of_thread) = FOUR_BIT_LAUNCH;
    let blocks = runs(n, dtype).div_ceil(threads * runs_of_thread);
    let kernel = format!("quant_four_bit_{}", suffix(dtype)?);
    gpu.launch(&kernel, (blocks, 1, 1), threads as u32, 0, &args)
}

/// Dequantizes the rows of `weight` from `first` on into all of `out` `[rows, cols]` (f32 or bf16).
pub(crate) fn int8(gpu: &Gpu, weight: &Int8, first: usize, out: &Tensor) -> Result<()> {
    let (dtype, (rows, cols)) = (out.dtype(), out.dims2()?);
    let args = [
        gpu.arg(&weight.codes.narrow(0, first, rows)?, DType::U8)?,
        gpu.arg(&weight.scales.narrow(0, first, rows)?, DType::F32)?,
        Arg::size(cols)?,
        gpu.arg(out, dtype)?,
    ];
    let kernel = format!("quant_int8_{}", suffix(dtype)?);
    gpu.launch(&kernel, (rows, 1, 1), row_threads(runs(cols, dtype)), 0, &args)
}
