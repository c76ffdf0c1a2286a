//! The norm on a GPU: one block per row.

use candle_core::{DType, Result, Tensor};
use lora_spec::NormKind;

use super::{NormActivations, NormParams};
use crate::cuda::{Arg, Gpu, row_threads, runs, suffix};

/// Adds `residual` to `x`; returns the normalized `x`.
pub(super) fn forward(
    gpu: &Gpu,
    x: &Tensor,
    residual: Option<&Tensor>,
    NormParams { kind, weight, bias, eps }: NormParams,
) -> Result<(Tensor, NormActivations)> {
    let ((tokens, features), dtype) = (x.dims2()?, x.dtype());
    let (y, rstd) = (gpu.empty((tokens, features), dtype)?, gpu.empty(tokens, DType::F32)?);
    let mean = (kind == NormKind::Layer).then(|| gpu.empty(tokens, DType::F32)).transpose()?;
    let mut args =
        vec![gpu.arg(&y, dtype)?, optional(gpu, mean.as_ref(), DType::F32)?, gpu.arg(&rstd, DType::F32)?];
    match residual {
        Some(residual) => args.extend([gpu.arg(x, dtype)?.updated(), gpu.arg(residual, dtype)?]),
        None => args.push(gpu.arg(x, dtype)?),
    }
    args.extend([gpu.arg(weight, DType::F32)?, optional(gpu, bias, DType::F32)?]);
    args.extend([(eps as f32).into(), Arg::size(features)?]);
    launch(gpu, kind, if residual.is_some() { "add_forward" } else { "forward" }, x, &args)?;
    Ok((y, NormActivations { mean, rstd }))
}

pub(super) fn recompute(
    gpu: &Gpu,
    saved: &NormActivations,
    x: &Tensor,
    NormParams { kind, weight, bias, .. }: NormParams,
) -> Result<Tensor> {
    let ((tokens, features), dtype) = (x.dims2()?, x.dtype());
    let y = gpu.empty((tokens, features), dtype)?;
    let args = [
        gpu.arg(&y, dtype)?,
        optional(gpu, saved.mean.as_ref(), DType::F32)?,
        gpu.arg(&saved.rstd, DType::F32)?,
        gpu.arg(x, dtype)?,
        gpu.arg(weight, DType::F32)?,
        optional(gpu, bias, DType::F32)?,
        Arg::size(features)?,
    ];
    launch(gpu, kind, "recompute", x, &args)?;
    Ok(y)
}

pub(super) fn backward(
    gpu: &Gpu,
    saved: &NormActivations,
    x: &Tensor,
    NormParams { kind, weight, .. }: NormParams,
    dy: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let ((tokens, features), dtype) = (x.dims2()?, x.dtype());
    let dx = gpu.empty((tokens, features), dtype)?;
    let args = [
        gpu.arg(&dx, dtype)?,
        optional(gpu, saved.mean.as_ref(), DType::F32)?,
        gpu.arg(&saved.rstd, DType::F32)?,
        gpu.arg(x, dtype)?,
        gpu.arg(weight, DType::F32)?,
        gpu.arg(dy, dtype)?,
        optional(gpu, residual, dtype)?,
        Arg::size(features)?,
    ];
    launch(gpu, kind, "backward", x, &args)?;
    Ok(dx)
}

/// The argument of a tensor, or a null pointer.
fn optional(gpu: &Gpu, tensor: Option<&Tensor>, dtype: DType) -> Result<Arg> {
    tensor.map_or(Ok(0_u64.into()), |tensor| gpu.arg(tensor, dtype))
}

fn launch(gpu: &Gpu, kind: NormKind, what: &str, x: &Tensor, args: &[Arg]) -> Result<()> {
    let ((tokens, features), dtype) = (x.dims2()?, x.dtype());
    let kind = match kind {
        NormKind::Rms => "rms",
        NormKind::Layer => "layer",
    };
    let kernel = format!("{kind}_norm_{what}_{}", suffix(dtype)?);
    gpu.launch(&kernel, (tokens, 1, 1), row_threads(runs(features, dtype)), 0, args)
}
