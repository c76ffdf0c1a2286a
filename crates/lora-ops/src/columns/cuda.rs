use candle_core::{Result, Tensor};

use super::Columns;
use crate::cuda::{Arg, Gpu, row_grid, runs, suffix};

pub(super) fn copy(
    gpu: &Gpu,
    source: &Tensor,
    target: &Tensor,
    Columns { width, from, to }: Columns,
) -> Result<()> {
    let (dtype, (rows, source_columns)) = (source.dtype(), source.dims2()?);
    let (blocks, threads) = row_grid(rows, runs(width, dtype));
    let written = rows * width * dtype.size_in_bytes();
    let args = [
        gpu.arg(source, dtype)?.with_bytes(written),
        gpu.arg(target, dtype)?.with_bytes(written),
        Arg::size(source_columns)?,
        Arg::size(target.dims2()?.1)?,
        Arg::size(from)?,
        Arg::size(to)?,
        Arg::size(width)?,
    ];
    gpu.launch(&format!("columns_copy_{}", suffix(dtype)?), blocks, threads, 0, &args)
}
