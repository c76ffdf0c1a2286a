//! RMSNorm (arXiv 1910.07467): `y = w x / sqrt(mean(x^2) + eps)`.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::cpu::{filled, read_f32};
use crate::simd::{dot, sum, vectorize};

/// What the backward pass needs beside `x`: `1 / sqrt(mean(x^2) + eps)` of each token.
#[derive(Debug)]
pub struct Saved {
    rstd: Vec<f32>,
}

/// `x` `[tokens, features]`, `weight` `[features]`, to the normalized `[tokens, features]`.
#[tracing::instrument(level = "trace", name = "rms_norm forward", skip_all)]
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Saved)> {
    let (tokens, features) = dims(x, weight)?;
    let mut rstd = vec![0.0; tokens];
    let y = read_f32(x, |x| {
        read_f32(weight, |w| {
            filled((tokens, features), |y| {
                let rows = y.par_chunks_mut(features).zip(x.par_chunks(features)).zip(&mut rstd);
                rows.with_min_len(8).for_each(|((y, x), rstd)| {
                    vectorize(|| {
                        *rstd = 1.0 / (dot(x, x) / features as f32 + eps as f32).sqrt();
                        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                            *y = w * (x * *rstd);
                        }
                    });
                });
            })
        })
    })???;
    Ok((y, Saved { rstd }))
}

/// The normalized tensor again, from what was saved.
#[tracing::instrument(level = "trace", name = "rms_norm again", skip_all)]
pub fn again(saved: &Saved, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (tokens, features) = saved_dims(saved, x, weight)?;
    read_f32(x, |x| {
        read_f32(weight, |w| {
            filled((tokens, features), |y| {
                let rows = y.par_chunks_mut(features).zip(x.par_chunks(features)).zip(&saved.rstd);
                rows.with_min_len(8).for_each(|((y, x), rstd)| {
                    vectorize(|| {
                        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                            *y = w * (x * rstd);
                        }
                    });
                });
            })
        })
    })??
}

/// `dy` `[tokens, features]` to `dx` `[tokens, features]`.
#[tracing::instrument(level = "trace", name = "rms_norm backward", skip_all)]
pub fn backward(saved: &Saved, x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (tokens, features) = saved_dims(saved, x, weight)?;
    if dy.dims2()? != (tokens, features) {
        candle_core::bail!("gradient {:?} of a norm of [{tokens}, {features}]", dy.shape());
    }
    read_f32(x, |x| -> Result<Tensor> {
        read_f32(weight, |w| -> Result<Tensor> {
            read_f32(dy, |dy| {
                filled((tokens, features), |dx| {
                    let rows = dx.par_chunks_mut(features).zip(x.par_chunks(features));
                    let rows = rows.zip(dy.par_chunks(features)).zip(&saved.rstd);
                    rows.with_min_len(8).for_each(|(((dx, x), dy), &rstd)| {
                        vectorize(|| {
                            let projection = sum(features, |i| w[i] * dy[i] * x[i]);
                            let factor = projection * rstd * rstd * rstd / features as f32;
                            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                                *dx = rstd * (w * dy) - factor * x;
                            }
                        });
                    });
                })
            })?
        })?
    })?
}

fn saved_dims(saved: &Saved, x: &Tensor, weight: &Tensor) -> Result<(usize, usize)> {
    let (tokens, features) = dims(x, weight)?;
    if saved.rstd.len() != tokens {
        candle_core::bail!("a norm of {} tokens was saved, not of {tokens} tokens", saved.rstd.len());
    }
    Ok((tokens, features))
}

fn dims(x: &Tensor, weight: &Tensor) -> Result<(usize, usize)> {
    let (tokens, features) = x.dims2()?;
    if weight.dims1()? != features {
        candle_core::bail!("a norm of {:?} met {features} features", weight.shape());
    }
    Ok((tokens, features))
}
