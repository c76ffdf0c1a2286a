//! The low-rank update of a frozen layer (LoRA, arXiv 2106.09685): `y += s (x A^T) B^T`.

use candle_core::{DType, Result, Tensor};

use crate::backend::Backend;
use crate::dropout::Dropout;
use crate::gemm::{no_trans, product, trans};
use crate::pointwise::add_assign;

/// Activations that the backward pass needs in addition to `x`.
#[derive(Debug)]
pub struct LoraActivations {
    /// `x A^T` `[tokens, r]`, where `x` is taken after dropout.
    h: Tensor,
}

/// The matrices of one module, `a` `[r, in_features]` and `b` `[out_features, r]`: either the
/// trained ones, of the activations' type, or their f32 gradients.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// PEFT's `lora_A.weight`.
    pub a: Tensor,
    /// PEFT's `lora_B.weight`.
    pub b: Tensor,
}

/// Adds `scaling (dropout(x) A^T) B^T` to `y` `[tokens, out_features]` in place; `x` is
/// `[tokens, in_features]`.
#[tracing::instrument(level = "trace", name = "lora forward", skip_all)]
pub fn forward(
    x: &Tensor,
    pair: &LoraPair,
    scaling: f64,
    dropout: Option<&Dropout>,
    y: &Tensor,
) -> Result<LoraActivations> {
    let (tokens, in_features) = x.dims2()?;
    let (r, out_features) = pair_dims(pair, in_features)?;
    if y.dims2()? != (tokens, out_features) {
        candle_core::bail!("invalid LoRA output {:?}; it must be [{tokens}, {out_features}]", y.shape());
    }
    let saved = compute_h(x, pair, (tokens, r), dropout)?;
    product(scaling as f32, no_trans(&saved.h), trans(&pair.b), 1.0, y)?;
    Ok(saved)
}

/// Recomputes the activations that [`forward`] returns for `x` `[tokens, in_features]`.
#[tracing::instrument(level = "trace", name = "lora recompute", skip_all)]
pub fn recompute(x: &Tensor, pair: &LoraPair, dropout: Option<&Dropout>) -> Result<LoraActivations> {
    let (tokens, in_features) = x.dims2()?;
    let (r, _) = pair_dims(pair, in_features)?;
    compute_h(x, pair, (tokens, r), dropout)
}

/// Returns `h = x A^T`, where `x` is taken after dropout.
fn compute_h(
    x: &Tensor,
    pair: &LoraPair,
    shape: (usize, usize),
    dropout: Option<&Dropout>,
) -> Result<LoraActivations> {
    let dropped = dropout.map(|d| d.apply(x)).transpose()?;
    let h = new_like(x, shape)?;
    product(1.0, no_trans(dropped.as_ref().unwrap_or(x)), trans(&pair.a), 0.0, &h)?;
    Ok(LoraActivations { h })
}

/// Adds the gradients of `A` and `B` to `grad`, and the gradient of `x` to `dx` (`None`: not
/// needed).
///
/// `x` `[tokens, in_features]` is the input of the forward pass before dropout, and `dy` is
/// `[tokens, out_features]`.
#[tracing::instrument(level = "trace", name = "lora backward", skip_all)]
#[expect(clippy::too_many_arguments, reason = "the operands of the chain rule")]
pub fn backward(
    saved: &LoraActivations,
    x: &Tensor,
    pair: &LoraPair,
    scaling: f64,
    dropout: Option<&Dropout>,
    dy: &Tensor,
    grad: &LoraPair,
    dx: Option<&Tensor>,
) -> Result<()> {
    let (tokens, in_features) = x.dims2()?;
    let (r, out_features) = pair_dims(pair, in_features)?;
    if saved.h.dims2()? != (tokens, r)
        || dy.dims2()? != (tokens, out_features)
        || grad.a.shape() != pair.a.shape()
        || grad.b.shape() != pair.b.shape()
        || dx.is_some_and(|dx| dx.shape() != x.shape())
    {
        candle_core::bail!(
            "invalid LoRA gradients for x {:?}: dy is {:?}, a {:?}, b {:?} and dx {:?}; they must \
             fit x and the pair",
            x.shape(),
            dy.shape(),
            grad.a.shape(),
            grad.b.shape(),
            dx.map(Tensor::shape)
        );
    }
    product(scaling as f32, trans(dy), no_trans(&saved.h), 1.0, &grad.b)?;
    let dh = compute_dh(pair, scaling, dy, r)?;
    let dropped = dropout.map(|d| d.apply(x)).transpose()?;
    product(1.0, trans(&dh), no_trans(dropped.as_ref().unwrap_or(x)), 1.0, &grad.a)?;
    match (dx, dropout) {
        (None, _) => Ok(()),
        (Some(dx), None) => product(1.0, no_trans(&dh), no_trans(&pair.a), 1.0, dx),
        (Some(dx), Some(dropout)) => {
            let through = new_like(x, (tokens, in_features))?;
            product(1.0, no_trans(&dh), no_trans(&pair.a), 0.0, &through)?;
            add_assign(dx, &dropout.apply(&through)?)
        }
    }
}

/// The backward pass of a frozen pair without dropout: adds `scaling (dy B) A` to `dx`
/// `[tokens, in_features]`; `dy` is `[tokens, out_features]`.
#[tracing::instrument(level = "trace", name = "lora backward", skip_all)]
pub fn backward_frozen(pair: &LoraPair, scaling: f64, dy: &Tensor, dx: &Tensor) -> Result<()> {
    let (tokens, in_features) = dx.dims2()?;
    let (r, out_features) = pair_dims(pair, in_features)?;
    if dy.dims2()? != (tokens, out_features) {
        candle_core::bail!("invalid LoRA gradient {:?}; it must be [{tokens}, {out_features}]", dy.shape());
    }
    product(1.0, no_trans(&compute_dh(pair, scaling, dy, r)?), no_trans(&pair.a), 1.0, dx)
}

/// Returns the gradient of `h` `[tokens, r]`, in the type of `dy`.
fn compute_dh(pair: &LoraPair, scaling: f64, dy: &Tensor, r: usize) -> Result<Tensor> {
    let dh = new_like(dy, (dy.dims()[0], r))?;
    product(scaling as f32, no_trans(dy), no_trans(&pair.b), 0.0, &dh)?;
    Ok(dh)
}

/// Creates a matrix of `x`'s type on its device; on a GPU its elements are uninitialized.
fn new_like(x: &Tensor, shape: (usize, usize)) -> Result<Tensor> {
    match Backend::of_tensors(&[x])? {
        Backend::Cpu => Tensor::zeros(shape, DType::F32, x.device()),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => gpu.empty(shape, x.dtype()),
    }
}

fn pair_dims(pair: &LoraPair, in_features: usize) -> Result<(usize, usize)> {
    let (r, a_in) = pair.a.dims2()?;
    let (out_features, b_r) = pair.b.dims2()?;
    if a_in != in_features || b_r != r {
        candle_core::bail!(
            "invalid LoRA matrices {:?} and {:?} for {in_features} features; they must be [r, in_features] \
             and [out_features, r]",
            pair.a.shape(),
            pair.b.shape()
        );
    }
    Ok((r, out_features))
}
