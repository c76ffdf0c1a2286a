//! LayerNorm (arXiv 1607.06450): `y = w (x - mean(x)) / sqrt(var(x) + eps) + b`, where `var` is the
//! mean square of `x - mean(x)`.

use candle_core::{Result, Tensor};

use crate::backend::Backend;
use crate::pointwise::add_assign;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// The frozen parameters of a norm.
#[derive(Debug, Clone, Copy)]
pub struct LayerNormParams<'a> {
    /// `w`, `[features]`, f32.
    pub weight: &'a Tensor,
    /// `b`, `[features]`, f32.
    pub bias: Option<&'a Tensor>,
    /// `eps`.
    pub eps: f64,
}

/// Activations that the backward pass needs in addition to `x`, `[tokens]`, f32.
#[derive(Debug)]
pub struct LayerNormActivations {
    mean: Tensor,
    /// `1 / sqrt(var(x) + eps)`.
    rstd: Tensor,
}

/// Normalizes `x` `[tokens, features]`; returns `[tokens, features]`.
#[tracing::instrument(level = "trace", name = "layer_norm forward", skip_all)]
pub fn forward(x: &Tensor, params: LayerNormParams) -> Result<(Tensor, LayerNormActivations)> {
    check(x, params)?;
    match Backend::of_tensors(&[x, params.weight, params.bias.unwrap_or(params.weight)])? {
        Backend::Cpu => cpu::forward(x, params),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::forward(&gpu, x, None, params),
    }
}

/// Adds `residual` to `x`, both `[tokens, features]`, in place, and returns the normalized sum.
#[tracing::instrument(level = "trace", name = "layer_norm add_forward", skip_all)]
pub fn add_forward(
    x: &Tensor,
    residual: &Tensor,
    params: LayerNormParams,
) -> Result<(Tensor, LayerNormActivations)> {
    check(x, params)?;
    check_gradient_or_residual(x, residual)?;
    match Backend::of_tensors(&[x, residual, params.weight, params.bias.unwrap_or(params.weight)])? {
        Backend::Cpu => {
            add_assign(x, residual)?;
            cpu::forward(x, params)
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::forward(&gpu, x, Some(residual), params),
    }
}

/// Recomputes the output of the forward pass from the saved activations.
#[tracing::instrument(level = "trace", name = "layer_norm recompute", skip_all)]
pub fn recompute(saved: &LayerNormActivations, x: &Tensor, params: LayerNormParams) -> Result<Tensor> {
    check_activations(saved, x, params)?;
    match Backend::of_tensors(&[x, params.weight, params.bias.unwrap_or(params.weight), &saved.rstd])? {
        Backend::Cpu => cpu::recompute(saved, x, params),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::recompute(&gpu, saved, x, params),
    }
}

/// Computes `dx` `[tokens, features]` from `dy` `[tokens, features]`, and adds `residual` if there
/// is one: the gradient that reaches `x` on other paths than through the norm.
#[tracing::instrument(level = "trace", name = "layer_norm backward", skip_all)]
pub fn backward(
    saved: &LayerNormActivations,
    x: &Tensor,
    params: LayerNormParams,
    dy: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    check_activations(saved, x, params)?;
    check_gradient_or_residual(x, dy)?;
    check_gradient_or_residual(x, residual.unwrap_or(dy))?;
    match Backend::of_tensors(&[x, params.weight, &saved.rstd, dy, residual.unwrap_or(dy)])? {
        Backend::Cpu => {
            let dx = cpu::backward(saved, x, params.weight, dy)?;
            if let Some(residual) = residual {
                add_assign(&dx, residual)?;
            }
            Ok(dx)
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::backward(&gpu, saved, x, params.weight, dy, residual),
    }
}

fn check(x: &Tensor, LayerNormParams { weight, bias, .. }: LayerNormParams) -> Result<()> {
    let features = x.dims2()?.1;
    for vector in [weight, bias.unwrap_or(weight)] {
        if features == 0 || vector.dims1()? != features {
            candle_core::bail!("invalid norm weight or bias {:?} for {features} features", vector.shape());
        }
    }
    Ok(())
}

fn check_activations(saved: &LayerNormActivations, x: &Tensor, params: LayerNormParams) -> Result<()> {
    check(x, params)?;
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
