//! Dequantizing on a GPU.

use candle_core::{DType, Result, Tensor};

use super::{FourBit, Int8, Scales};
use crate::cuda::{Arg, Gpu, suffix};

/// The elements of `weight` from `start` on, row after row, into all of `out` (f32 or bf16).
pub(crate) fn four_bit(gpu: &Gpu, weight: &FourBit, start: usize, out: &Tensor) -> Result<()> {
    let (dtype, n) = (out.dtype(), out.elem_count());
    let none = || Arg::from(0_u64);
    let [scales, map, absmax, offset, nested_block] = match &weight.scales {
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
            Arg::size(*block)?,
        ],
    };
    let args = [
        gpu.arg(&weight.codes, DType::U8)?.with_bytes(n / 2),
        gpu.arg(&weight.values, DType::F32)?,
        scales,
        map,
        absmax,
        offset,
        nested_block,
        Arg::size(weight.block)?,
        (start as u64).into(),
        gpu.arg(out, dtype)?,
        (n as u64).into(),
    ];
    gpu.launch_flat(&format!("quant_four_bit_{}", suffix(dtype)?), n, &args)
}

/// The rows of `weight` from `first` on into all of `out` (f32 or bf16).
pub(crate) fn int8(gpu: &Gpu, weight: &Int8, first: usize, out: &Tensor) -> Result<()> {
    let (dtype, n, cols) = (out.dtype(), out.elem_count(), weight.dims().1);
    let args = [
        gpu.arg(&weight.codes, DType::U8)?.with_bytes(n),
        gpu.arg(&weight.scales, DType::F32)?.with_bytes(4 * n / cols.max(1)),
        Arg::size(cols)?,
        ((first * cols) as u64).into(),
        gpu.arg(out, dtype)?,
        (n as u64).into(),
    ];
    gpu.launch_flat(&format!("quant_int8_{}", suffix(dtype)?), n, &args)
}
