//! RMSNorm (arXiv 1910.07467): `y = w x / sqrt(mean(x^2) + eps)`, and LayerNorm (arXiv 1607.06450),
//! which is RMSNorm of `x - mean(x)`; both plus a bias if there is one.

use candle_core::{Result, Tensor};
use lora_spec::NormKind;

use crate::backend::Backend;
use crate::pointwise::add_assign;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// The kind of a norm, and its frozen parameters.
#[derive(Debug, Clone, Copy)]
pub struct NormParams<'a> {
    /// Whether the mean is subtracted.
    pub kind: NormKind,
    /// `w`, `[features]`, f32.
    pub weight: &'a Tensor,
    /// `[features]`, f32.
    pub bias: Option<&'a Tensor>,
    /// `eps`.
    pub eps: f64,
}

/// Activations that the backward pass needs in addition to `x`, `[tokens]`, f32.
#[derive(Debug)]
pub struct NormActivations {
    /// `mean(x)`, of a LayerNorm.
    mean: Option<Tensor>,
    /// `1 / sqrt(var + eps)`, where `var` is the mean square of what is normalized.
    rstd: Tensor,
}

/// Normalizes `x` `[tokens, features]`; returns `[tokens, features]`.
#[tracing::instrument(level = "trace", name = "norm forward", skip_all)]
pub fn forward(x: &Tensor, params: NormParams) -> Result<(Tensor, NormActivations)> {
    check(x, params)?;
    match Backend::of_tensors(&[x, params.weight, params.bias.unwrap_or(params.weight)])? {
        Backend::Cpu => cpu::forward(x, params),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::forward(&gpu, x, None, params),
    }
}

/// Adds `residual` to `x`, both `[tokens, features]`, in place, and returns the normalized sum.
#[tracing::instrument(level = "trace", name = "norm add_forward", skip_all)]
pub fn add_forward(x: &Tensor, residual: &Tensor, params: NormParams) -> Result<(Tensor, NormActivations)> {
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
#[tracing::instrument(level = "trace", name = "norm recompute", skip_all)]
pub fn recompute(saved: &NormActivations, x: &Tensor, params: NormParams) -> Result<Tensor> {
    check_activations(saved, x, params)?;
    match Backend::of_tensors(&[x, params.weight, params.bias.unwrap_or(params.weight), &saved.rstd])? {
        Backend::Cpu => cpu::recompute(saved, x, params),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::recompute(&gpu, saved, x, params),
    }
}

/// Computes `dx` `[tokens, features]` from `dy` `[tokens, features]`, and adds `residual` if there
/// is one: the gradient that reaches `x` on other paths than through the norm.
#[tracing::instrument(level = "trace", name = "norm backward", skip_all)]
pub fn backward(
    saved: &NormActivations,
    x: &Tensor,
    params: NormParams,
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
        Backend::Cuda(gpu) => cuda::backward(&gpu, saved, x, params, dy, residual),
    }
}

fn check(x: &Tensor, NormParams { weight, bias, .. }: NormParams) -> Result<()> {
    let features = x.dims2()?.1;
    for vector in [weight, bias.unwrap_or(weight)] {
        if features == 0 || vector.dims1()? != features {
            candle_core::bail!("invalid norm weight or bias {:?} for {features} features", vector.shape());
        }
    }
    Ok(())
}

fn check_activations(saved: &NormActivations, x: &Tensor, params: NormParams) -> Result<()> {
    check(x, params)?;
    if saved.mean.is_some() != (params.kind == NormKind::Layer) {
        candle_core::bail!("invalid norm activations: they are of another kind of norm");
    }
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
