//! The gated activation of the MLP (GLU variants, arXiv 2002.05202): `activation(gate) * up`. An
//! MLP without a gate has the activation alone.

use candle_core::{Result, Tensor};
use lora_spec::ActivationFunction;

use crate::backend::Backend;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// Returns `activation(gate) * up` for `gate` and `up` `[tokens, features]`.
#[tracing::instrument(level = "trace", name = "glu forward", skip_all)]
pub fn forward(gate: &Tensor, up: &Tensor, activation: ActivationFunction) -> Result<Tensor> {
    check(gate, &[up])?;
    match Backend::of_tensors(&[gate, up])? {
        Backend::Cpu => cpu::forward(gate, up, activation),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::forward(&gpu, gate, up, activation),
    }
}

/// Computes the gradients of `gate` and `up` from `dy` `[tokens, features]`.
#[tracing::instrument(level = "trace", name = "glu backward", skip_all)]
pub fn backward(
    gate: &Tensor,
    up: &Tensor,
    dy: &Tensor,
    activation: ActivationFunction,
) -> Result<(Tensor, Tensor)> {
    check(gate, &[up, dy])?;
    match Backend::of_tensors(&[gate, up, dy])? {
        Backend::Cpu => cpu::backward(gate, up, dy, activation),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::backward(&gpu, gate, up, dy, activation),
    }
}

/// Returns `activation(x)` for `x` `[tokens, features]`.
#[tracing::instrument(level = "trace", name = "activation forward", skip_all)]
pub fn activation_forward(x: &Tensor, activation: ActivationFunction) -> Result<Tensor> {
    check(x, &[])?;
    match Backend::of_tensors(&[x])? {
        Backend::Cpu => cpu::activation_forward(x, activation),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::activation_forward(&gpu, x, activation),
    }
}

/// Computes the gradient of `x` from `dy` `[tokens, features]`.
#[tracing::instrument(level = "trace", name = "activation backward", skip_all)]
pub fn activation_backward(x: &Tensor, dy: &Tensor, activation: ActivationFunction) -> Result<Tensor> {
    check(x, &[dy])?;
    match Backend::of_tensors(&[x, dy])? {
        Backend::Cpu => cpu::activation_backward(x, dy, activation),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::activation_backward(&gpu, x, dy, activation),
    }
}

fn check(gate: &Tensor, others: &[&Tensor]) -> Result<()> {
    let shape = gate.dims2()?;
    for other in others {
        if other.dims2()? != shape {
            candle_core::bail!(
                "invalid activation of {:?} with {:?}: the shapes differ",
                gate.shape(),
                other.shape()
            );
        }
    }
    Ok(())
}
