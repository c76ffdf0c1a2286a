//! The low-rank update of a frozen layer (LoRA, arXiv 2106.09685): `y += s (x A^T) B^T`.

use candle_core::{Result, Tensor};

use crate::cpu::{filled, read_f32, update_f32};
use crate::dropout::Dropout;
use crate::gemm::{Mat, gemm};

/// What the backward pass needs of the forward pass, beside `x`.
#[derive(Debug)]
pub struct Saved {
    /// `x A^T` `[tokens, r]`, `x` after dropout.
    h: Tensor,
}

/// The trained matrices of one module, f32: `a` `[r, in_features]`, `b` `[out_features, r]`.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// PEFT's `lora_A.weight`.
    pub a: Tensor,
    /// PEFT's `lora_B.weight`.
    pub b: Tensor,
}

/// Adds `scaling (dropout(x) A^T) B^T` to `y` `[tokens, out_features]` in place; `x` is `[tokens, in_features]`.
#[tracing::instrument(level = "trace", name = "lora forward", skip_all)]
pub fn forward(
    x: &Tensor,
    pair: &LoraPair,
    scaling: f64,
    dropout: Option<&Dropout>,
    y: &Tensor,
) -> Result<Saved> {
    let (tokens, in_features) = x.dims2()?;
    let (r, out_features) = pair_dims(pair, in_features)?;
    if y.dims2()? != (tokens, out_features) {
        candle_core::bail!("LoRA output is [{tokens}, {out_features}], not {:?}", y.shape());
    }
    let dropped = dropout.map(|d| d.apply(x)).transpose()?;
    let h = read_f32(dropped.as_ref().unwrap_or(x), |x| {
        read_f32(&pair.a, |a| {
            filled((tokens, r), |h| {
                gemm(1.0, Mat::new(x, tokens, in_features), Mat::new(a, r, in_features).t(), 0.0, h, r);
            })
        })
    })???;
    read_f32(&h, |h| {
        read_f32(&pair.b, |b| {
            update_f32(y, |y| {
                let b = Mat::new(b, out_features, r).t();
                gemm(scaling as f32, Mat::new(h, tokens, r), b, 1.0, y, out_features);
            })
        })
    })???;
    Ok(Saved { h })
}

/// Adds the gradients of `A` and `B` to `grad`, and that of `x` to `dx` (`None`: not needed).
///
/// `x` `[tokens, in_features]` is the forward pass's input (before dropout), `dy` `[tokens, out_features]`.
#[tracing::instrument(level = "trace", name = "lora backward", skip_all)]
#[expect(clippy::too_many_arguments, reason = "the operands of the chain rule")]
pub fn backward(
    saved: &Saved,
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
            "LoRA of {:?}: gradient {:?} to {:?}, {:?} and {:?}",
            x.shape(),
            dy.shape(),
            grad.a.shape(),
            grad.b.shape(),
            dx.map(Tensor::shape)
        );
    }
    let scaling = scaling as f32;
    let dh = read_f32(dy, |dy| -> Result<Tensor> {
        let dy = Mat::new(dy, tokens, out_features);
        read_f32(&saved.h, |h| {
            update_f32(&grad.b, |db| gemm(scaling, dy.t(), Mat::new(h, tokens, r), 1.0, db, r))
        })??;
        read_f32(&pair.b, |b| {
            filled((tokens, r), |dh| gemm(scaling, dy, Mat::new(b, out_features, r), 0.0, dh, r))
        })?
    })??;
    let dropped = dropout.map(|d| d.apply(x)).transpose()?;
    read_f32(&dh, |dh| -> Result<()> {
        let dh = Mat::new(dh, tokens, r);
        read_f32(dropped.as_ref().unwrap_or(x), |x| {
            let x = Mat::new(x, tokens, in_features);
            update_f32(&grad.a, |da| gemm(1.0, dh.t(), x, 1.0, da, in_features))
        })??;
        let Some(dx) = dx else { return Ok(()) };
        read_f32(&pair.a, |a| -> Result<()> {
            let a = Mat::new(a, r, in_features);
            match dropout {
                None => update_f32(dx, |dx| gemm(1.0, dh, a, 1.0, dx, in_features)),
                Some(dropout) => {
                    let through = filled((tokens, in_features), |d| gemm(1.0, dh, a, 0.0, d, in_features))?;
                    crate::cpu::add_assign(dx, &dropout.apply(&through)?)
                }
            }
        })?
    })?
}

fn pair_dims(pair: &LoraPair, in_features: usize) -> Result<(usize, usize)> {
    let (r, a_in) = pair.a.dims2()?;
    let (out_features, b_r) = pair.b.dims2()?;
    if a_in != in_features || b_r != r {
        candle_core::bail!(
            "LoRA matrices {:?} and {:?} do not fit {in_features} features",
            pair.a.shape(),
            pair.b.shape()
        );
    }
    Ok((r, out_features))
}
