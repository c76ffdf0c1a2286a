//! RMSNorm (arXiv 1910.07467): `y = w x / sqrt(mean(x^2) + eps)`.

use candle_core::{Result, Tensor};

use crate::backend::Backend;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// What the backward pass needs beside `x`.
#[derive(Debug)]
pub struct RmsNormActivations {
    /// `1 / sqrt(mean(x^2) + eps)` of each token, f32.
    rstd: Tensor,
}

/// `x` `[tokens, features]`, `weight` `[features]` (f32), to the normalized `[tokens, features]`.
#[tracing::instrument(level = "trace", name = "rms_norm forward", skip_all)]
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, RmsNormActivations)> {
    check(x, weight)?;
    let (y, rstd) = match Backend::of_tensors(&[x, weight])? {
        Backend::Cpu => cpu::forward(x, weight, eps)?,
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::forward(&gpu, x, None, weight, eps)?,
    };
    Ok((y, RmsNormActivations { rstd }))
}

/// Adds `residual` to `x`, both `[tokens, features]`, in place, and norms the sum.
#[tracing::instrument(level = "trace", name = "rms_norm add_forward", skip_all)]
pub fn add_forward(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, RmsNormActivations)> {
    check(x, weight)?;
    check_gradient_or_residual(x, residual)?;
    let (y, rstd) = match Backend::of_tensors(&[x, residual, weight])? {
        Backend::Cpu => {
            crate::add_assign(x, residual)?;
            cpu::forward(x, weight, eps)?
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::forward(&gpu, x, Some(residual), weight, eps)?,
    };
    Ok((y, RmsNormActivations { rstd }))
}

/// The normalized tensor again, from what was saved.
#[tracing::instrument(level = "trace", name = "rms_norm recompute", skip_all)]
pub fn recompute(saved: &RmsNormActivations, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    check_activations(saved, x, weight)?;
    match Backend::of_tensors(&[x, weight, &saved.rstd])? {
        Backend::Cpu => cpu::recompute(&saved.rstd, x, weight),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::recompute(&gpu, &saved.rstd, x, weight),
    }
}

/// `dy` `[tokens, features]` to `dx` `[tokens, features]`, plus `residual` where there is one: the gradient that reaches
/// `x` beside the norm.
#[tracing::instrument(level = "trace", name = "rms_norm backward", skip_all)]
pub fn backward(
    saved: &RmsNormActivations,
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    check_activations(saved, x, weight)?;
    check_gradient_or_residual(x, dy)?;
    check_gradient_or_residual(x, residual.unwrap_or(dy))?;
    match Backend::of_tensors(&[x, weight, &saved.rstd, dy, residual.unwrap_or(dy)])? {
        Backend::Cpu => cpu::backward(&saved.rstd, x, weight, dy, residual),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::backward(&gpu, &saved.rstd, x, weight, dy, residual),
    }
}

fn check(x: &Tensor, weight: &Tensor) -> Result<()> {
    let features = x.dims2()?.1;
    if features == 0 || weight.dims1()? != features {
        candle_core::bail!("a norm of {:?} met {features} features", weight.shape());
    }
    Ok(())
}

fn check_activations(saved: &RmsNormActivations, x: &Tensor, weight: &Tensor) -> Result<()> {
    check(x, weight)?;
    let (tokens, of) = (x.dims2()?.0, saved.rstd.dims1()?);
    if of != tokens {
        candle_core::bail!("a norm of {of} tokens was saved, not of {tokens} tokens");
    }
    Ok(())
}

fn check_gradient_or_residual(x: &Tensor, other: &Tensor) -> Result<()> {
    if other.dims() != x.dims() {
        candle_core::bail!("gradient or residual {:?} of a norm of {:?}", other.shape(), x.shape());
    }
    Ok(())
}
