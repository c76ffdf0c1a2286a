//! The norm on the CPU, rows in parallel.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::{LayerNormActivations, LayerNormParams};
use crate::cpu::read_f32;
use crate::simd::{sum, vectorize};

pub(super) fn forward(x: &Tensor, params: LayerNormParams) -> Result<(Tensor, LayerNormActivations)> {
    let (tokens, features) = x.dims2()?;
    let rows = &*read_f32(x)?;
    let (mut means, mut rstds) = (vec![0.0; tokens], vec![0.0; tokens]);
    let stats = means.par_iter_mut().zip(&mut rstds).zip(rows.par_chunks(features));
    stats.with_min_len(8).for_each(|((mean, rstd), x)| {
        vectorize(|| {
            let of_row = sum(features, |i| x[i]) / features as f32;
            let variance = sum(features, |i| (x[i] - of_row) * (x[i] - of_row)) / features as f32;
            (*mean, *rstd) = (of_row, 1.0 / (variance + params.eps as f32).sqrt());
        });
    });
    let vector = |values| Tensor::from_vec(values, tokens, &Device::Cpu);
    let saved = LayerNormActivations { mean: vector(means)?, rstd: vector(rstds)? };
    Ok((recompute(&saved, x, params)?, saved))
}

pub(super) fn recompute(
    saved: &LayerNormActivations,
    x: &Tensor,
    LayerNormParams { weight, bias, .. }: LayerNormParams,
) -> Result<Tensor> {
    let (tokens, features) = x.dims2()?;
    let (means, rstds) = (&*read_f32(&saved.mean)?, &*read_f32(&saved.rstd)?);
    let (x, w) = (&*read_f32(x)?, &*read_f32(weight)?);
    let bias = bias.map(read_f32).transpose()?;
    let mut y = vec![0.0; tokens * features];
    let rows = y.par_chunks_mut(features).zip(x.par_chunks(features)).zip(means).zip(rstds);
    rows.with_min_len(8).for_each(|(((y, x), mean), rstd)| {
        vectorize(|| {
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = w * ((x - mean) * rstd);
            }
            if let Some(bias) = &bias {
                y.iter_mut().zip(bias.iter()).for_each(|(y, b)| *y += b);
            }
        });
    });
    Tensor::from_vec(y, (tokens, features), &Device::Cpu)
}

pub(super) fn backward(
    saved: &LayerNormActivations,
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    let (tokens, features) = x.dims2()?;
    let (means, rstds) = (&*read_f32(&saved.mean)?, &*read_f32(&saved.rstd)?);
    let (x, w, dy) = (&*read_f32(x)?, &*read_f32(weight)?, &*read_f32(dy)?);
    let mut dx = vec![0.0; tokens * features];
    let rows = dx.par_chunks_mut(features).zip(x.par_chunks(features)).zip(dy.par_chunks(features));
    rows.zip(means).zip(rstds).with_min_len(8).for_each(|((((dx, x), dy), &mean), &rstd)| {
        vectorize(|| {
            let of_mean = sum(features, |i| w[i] * dy[i]) / features as f32;
            let projection = sum(features, |i| w[i] * dy[i] * (x[i] - mean));
            let factor = projection * rstd * rstd * rstd / features as f32;
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                *dx = rstd * (w * dy - of_mean) - factor * (x - mean);
            }
        });
    });
    Tensor::from_vec(dx, (tokens, features), &Device::Cpu)
}
