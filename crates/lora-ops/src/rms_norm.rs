//! RMSNorm (arXiv 1910.07467): `y = w x / sqrt(mean(x^2) + eps)`.

use candle_core::{Result, Tensor};

use crate::backend::Backend;
use crate::pointwise::add_assign;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// Activations that the backward pass needs in addition to `x`.
#[derive(Debug)]
pub struct RmsNormActivations {
    /// `1 / sqrt(mean(x^2) + eps)` of each token, f32.
    rstd: Tensor,
}

/// Normalizes `x` `[tokens, features]` and multiplies it by `weight` `[features]` (f32); returns
/// `[tokens, features]`.
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

/// Adds `residual` to `x`, both `[tokens, features]`, in place, and returns the normalized sum.
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
            add_assign(x, residual)?;
            cpu::forward(x, weight, eps)?
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::forward(&gpu, x, Some(residual), weight, eps)?,
    };
    Ok((y, RmsNormActivations { rstd }))
}

/// Recomputes the output of the forward pass from the saved activations.
#[tracing::instrument(level = "trace", name = "rms_norm recompute", skip_all)]
pub fn recompute(saved: &RmsNormActivations, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    check_activations(saved, x, weight)?;
    match Backend::of_tensors(&[x, weight, &saved.rstd])? {
        Backend::Cpu => cpu::recompute(&saved.rstd, x, weight),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::recompute(&gpu, &saved.rstd, x, weight),
    }
}

/// Computes `dx` `[tokens, features]` from `dy` `[tokens, features]`, and adds `residual` if there
/// is one: the gradient that reaches `x` on other paths than through the norm.
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
        Backend::Cpu => {
            let dx = cpu::backward(&saved.rstd, x, weight, dy)?;
            if let Some(residual) = residual {
                add_assign(&dx, residual)?;
            }
            Ok(dx)
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::backward(&gpu, &saved.rstd, x, weight, dy, residual),
    }
}

fn check(x: &Tensor, weight: &Tensor) -> Result<()> {
    let features = x.dims2()?.1;
    if features == 0 || weight.dims1()? != features {
        candle_core::bail!("invalid norm weight {:?} for {features} features", weight.shape());
    }
    Ok(())
}

fn check_activations(saved: &RmsNormActivations, x: &Tensor, weight: &Tensor) -> Result<()> {
    check(x, weight)?;
    let (tokens, of) = (x.dims2()?.0, saved.rstd.dims1()?);
    if of != tokens {
        candle_core::bail!("invalid norm activations of {of} tokens for {tokens} tokens");
    }
    Ok(())
}

fn check_gradient_or_residual(x: &Tensor, other: &Tensor) -> Result<()> {
    if other.dims() != x.dims() {
        candle_core::bail!("invalid gradient or residual {:?} for a norm of {:?}", other.shape(), x.shape());
    }
    Ok(())
}
