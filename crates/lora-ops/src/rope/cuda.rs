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
    // A thread for each run of the lower features of a head; if they are interleaved with the upper
    // ones, for each pair.
    let (kernel, parts) = match table.is_interleaved {
        false => ("rotate", runs(half, dtype)),
        true => ("rotate_interleaved", half),
    };
    let (blocks, threads) = row_grid(tokens, heads * parts);
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
    gpu.launch(&format!("rope_{kernel}_{}", suffix(dtype)?), blocks, threads, 0, &args)
}
