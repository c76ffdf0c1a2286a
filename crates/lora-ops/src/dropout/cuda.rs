//! Dropout on a GPU.

use candle_core::{Result, Tensor};

use super::Dropout;
use crate::cuda::{Arg, Gpu, row_grid, runs, suffix};

pub(super) fn apply(gpu: &Gpu, dropout: &Dropout, x: &Tensor) -> Result<Tensor> {
    let ((tokens, features), dtype) = (x.dims2()?, x.dtype());
    let y = gpu.empty((tokens, features), dtype)?;
    let (blocks, threads) = row_grid(tokens, runs(features, dtype));
    let [key_low, key_high] = dropout.philox.key();
    let args = [
        gpu.arg(&y, dtype)?,
        gpu.arg(x, dtype)?,
        dropout.tokens.arg()?,
        Arg::size(features)?,
        key_low.into(),
        key_high.into(),
        dropout.step.into(),
        dropout.probability.into(),
        dropout.keep_scale().into(),
    ];
    gpu.launch(&format!("dropout_apply_{}", suffix(dtype)?), blocks, threads, 0, &args)?;
    Ok(y)
}
