//! Rotation on a GPU.

use candle_core::{DType, Result, Tensor};

use super::RopeTable;
use crate::cuda::{Arg, Gpu, row_grid, runs, suffix};

pub(super) fn rotate(
    gpu: &Gpu,
    table: &RopeTable,
    x: &Tensor,
    seq: usize,
    first: usize,
    direction: f32,
) -> Result<()> {
    let ((tokens, features), half, dtype) = (x.dims2()?, table.half, x.dtype());
    let heads = features / table.head_dim;
    let (blocks, threads) = row_grid(tokens, heads * runs(half, dtype));
    let args = [
        gpu.arg(x, dtype)?.updated(),
        gpu.arg(&table.cos, DType::F32)?,
        gpu.arg(&table.sin, DType::F32)?,
        Arg::size(heads)?,
        Arg::size(table.head_dim)?,
        Arg::size(half)?,
        Arg::size(seq)?,
        Arg::size(first)?,
        direction.into(),
    ];
    gpu.launch(&format!("rope_rotate_{}", suffix(dtype)?), blocks, threads, 0, &args)
}
