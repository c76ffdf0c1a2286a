//! Rows of a matrix, copied on a GPU.

use candle_core::{Result, Tensor};

use crate::Ids;
use crate::cuda::{Arg, Gpu, row_grid, runs, suffix};

pub(super) fn forward(gpu: &Gpu, weight: &Tensor, tokens: &Ids) -> Result<Tensor> {
    let (features, dtype) = (weight.dims2()?.1, weight.dtype());
    let y = gpu.empty((tokens.len(), features), dtype)?;
    let (blocks, threads) = row_grid(tokens.len(), runs(features, dtype));
    // The kernel reads only the tokens' rows of the weight.
    let rows = gpu.arg(weight, dtype)?.with_bytes(tokens.len() * features * dtype.size_in_bytes());
    let args = [gpu.arg(&y, dtype)?, rows, tokens.arg()?, Arg::size(features)?];
    gpu.launch(&format!("embedding_forward_{}", suffix(dtype)?), blocks, threads, 0, &args)?;
    Ok(y)
}
