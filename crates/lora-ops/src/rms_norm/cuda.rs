//! The norm on a GPU: one block per row.

use candle_core::{DType, Result, Tensor};

use crate::cuda::{Arg, Gpu, row_threads, runs, suffix};

/// Adds `residual` to `x`; returns the normalized `x`, and `1 / sqrt(mean(x^2) + eps)` of each row.
pub(super) fn forward(
    gpu: &Gpu,
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let ((tokens, features), dtype) = (x.dims2()?, x.dtype());
    let (y, rstd) = (gpu.empty((tokens, features), dtype)?, gpu.empty(tokens, DType::F32)?);
    let mut args = vec![gpu.arg(&y, dtype)?, gpu.arg(&rstd, DType::F32)?];
    match residual {
        Some(residual) => args.extend([gpu.arg(x, dtype)?.updated(), gpu.arg(residual, dtype)?]),
        None => args.push(gpu.arg(x, dtype)?),
    }
    args.extend([gpu.arg(weight, DType::F32)?, (eps as f32).into(), Arg::size(features)?]);
    launch(gpu, if residual.is_some() { "add_forward" } else { "forward" }, x, &args)?;
    Ok((y, rstd))
}

pub(super) fn recompute(gpu: &Gpu, rstd: &Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((tokens, features), dtype) = (x.dims2()?, x.dtype());
    let y = gpu.empty((tokens, features), dtype)?;
    let args = [
        gpu.arg(&y, dtype)?,
        gpu.arg(rstd, DType::F32)?,
        gpu.arg(x, dtype)?,
        gpu.arg(weight, DType::F32)?,
        Arg::size(features)?,
    ];
    launch(gpu, "recompute", x, &args)?;
    Ok(y)
}

pub(super) fn backward(
    gpu: &Gpu,
    rstd: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let ((tokens, features), dtype) = (x.dims2()?, x.dtype());
    let dx = gpu.empty((tokens, features), dtype)?;
    let args = [
        gpu.arg(&dx, dtype)?,
        gpu.arg(rstd, DType::F32)?,
        gpu.arg(x, dtype)?,
        gpu.arg(weight, DType::F32)?,
        gpu.arg(dy, dtype)?,
        match residual {
            Some(residual) => gpu.arg(residual, dtype)?,
            None => 0_u64.into(),
        },
        Arg::size(features)?,
    ];
    launch(gpu, "backward", x, &args)?;
    Ok(dx)
}

fn launch(gpu: &Gpu, what: &str, x: &Tensor, args: &[Arg]) -> Result<()> {
    let ((tokens, features), dtype) = (x.dims2()?, x.dtype());
    let kernel = format!("rms_norm_{what}_{}", suffix(dtype)?);
    gpu.launch(&kernel, (tokens, 1, 1), row_threads(runs(features, dtype)), 0, args)
}
