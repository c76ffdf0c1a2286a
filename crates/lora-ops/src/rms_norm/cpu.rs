//! The norm on the CPU, rows in parallel.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use crate::cpu::read_f32;
use crate::simd::{dot, sum, vectorize};

/// Returns the normalized `x`, and `1 / sqrt(mean(x^2) + eps)` of each row.
pub(super) fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let (tokens, features) = x.dims2()?;
    let (x, w) = (&*read_f32(x)?, &*read_f32(weight)?);
    let (mut y, mut rstd) = (vec![0.0; tokens * features], vec![0.0; tokens]);
    let rows = y.par_chunks_mut(features).zip(x.par_chunks(features)).zip(&mut rstd);
    rows.with_min_len(8).for_each(|((y, x), rstd)| {
        vectorize(|| {
            *rstd = 1.0 / (dot(x, x) / features as f32 + eps as f32).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = w * (x * *rstd);
            }
        });
    });
    let y = Tensor::from_vec(y, (tokens, features), &Device::Cpu)?;
    Ok((y, Tensor::from_vec(rstd, tokens, &Device::Cpu)?))
}

pub(super) fn recompute(rstd: &Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (tokens, features) = x.dims2()?;
    let (rstd, x, w) = (&*read_f32(rstd)?, &*read_f32(x)?, &*read_f32(weight)?);
    let mut y = vec![0.0; tokens * features];
    let rows = y.par_chunks_mut(features).zip(x.par_chunks(features)).zip(rstd);
    rows.with_min_len(8).for_each(|((y, x), rstd)| {
        vectorize(|| {
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = w * (x * rstd);
            }
        });
    });
    Tensor::from_vec(y, (tokens, features), &Device::Cpu)
}

pub(super) fn backward(rstd: &Tensor, x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (tokens, features) = x.dims2()?;
    let (rstd, x) = (&*read_f32(rstd)?, &*read_f32(x)?);
    let (w, dy) = (&*read_f32(weight)?, &*read_f32(dy)?);
    let mut dx = vec![0.0; tokens * features];
    let rows = dx.par_chunks_mut(features).zip(x.par_chunks(features));
    let rows = rows.zip(dy.par_chunks(features)).zip(rstd);
    rows.with_min_len(8).for_each(|(((dx, x), dy), &rstd)| {
        vectorize(|| {
            let projection = sum(features, |i| w[i] * dy[i] * x[i]);
            let factor = projection * rstd * rstd * rstd / features as f32;
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                *dx = rstd * (w * dy) - factor * x;
            }
        });
    });
    Tensor::from_vec(dx, (tokens, features), &Device::Cpu)
}
