//! The norm on the CPU, rows in parallel. The mean of an RMSNorm is 0: subtracting it changes no
//! bit.

use candle_core::{Device, Result, Tensor};
use lora_spec::NormKind;
use rayon::prelude::*;

use super::{NormActivations, NormParams};
use crate::cpu::read_f32;
use crate::simd::{sum, vectorize};

pub(super) fn forward(x: &Tensor, params: NormParams) -> Result<(Tensor, NormActivations)> {
    let (tokens, features) = x.dims2()?;
    let (rows, weight) = (&*read_f32(x)?, &*read_f32(params.weight)?);
    let bias = params.bias.map(read_f32).transpose()?;
    let mut y = vec![0.0; tokens * features];
    let (mut means, mut rstds) = (vec![0.0; tokens], vec![0.0; tokens]);
    let outputs = y.par_chunks_mut(features).zip(&mut means).zip(&mut rstds);
    outputs.zip(rows.par_chunks(features)).with_min_len(8).for_each(|(((y, mean), rstd), x)| {
        vectorize(|| {
            if params.kind == NormKind::Layer {
                *mean = sum(features, |i| x[i]) / features as f32;
            }
            let variance = sum(features, |i| (x[i] - *mean) * (x[i] - *mean)) / features as f32;
            *rstd = 1.0 / (variance + params.eps as f32).sqrt();
            normalize(y, x, *mean, *rstd, weight, bias.as_deref());
        });
    });
    let vector = |values| Tensor::from_vec(values, tokens, &Device::Cpu);
    let mean = (params.kind == NormKind::Layer).then(|| vector(means)).transpose()?;
    let saved = NormActivations { mean, rstd: vector(rstds)? };
    Ok((Tensor::from_vec(y, (tokens, features), &Device::Cpu)?, saved))
}

pub(super) fn recompute(saved: &NormActivations, x: &Tensor, params: NormParams) -> Result<Tensor> {
    let (tokens, features) = x.dims2()?;
    let (means, rstds) = (saved.means()?, &*read_f32(&saved.rstd)?);
    let (x, weight) = (&*read_f32(x)?, &*read_f32(params.weight)?);
    let bias = params.bias.map(read_f32).transpose()?;
    let mut y = vec![0.0; tokens * features];
    let rows = y.par_chunks_mut(features).zip(x.par_chunks(features)).zip(&means).zip(rstds);
    rows.with_min_len(8).for_each(|(((y, x), &mean), &rstd)| {
        vectorize(|| normalize(y, x, mean, rstd, weight, bias.as_deref()));
    });
    Tensor::from_vec(y, (tokens, features), &Device::Cpu)
}

#[inline(always)]
fn normalize(y: &mut [f32], x: &[f32], mean: f32, rstd: f32, weight: &[f32], bias: Option<&[f32]>) {
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = w * ((x - mean) * rstd);
    }
    if let Some(bias) = bias {
        y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }
}

pub(super) fn backward(saved: &NormActivations, x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (tokens, features) = x.dims2()?;
    let is_centered = saved.mean.is_some();
    let (means, rstds) = (saved.means()?, &*read_f32(&saved.rstd)?);
    let (x, w, dy) = (&*read_f32(x)?, &*read_f32(weight)?, &*read_f32(dy)?);
    let mut dx = vec![0.0; tokens * features];
    let rows = dx.par_chunks_mut(features).zip(x.par_chunks(features)).zip(dy.par_chunks(features));
    rows.zip(&means).zip(rstds).with_min_len(8).for_each(|((((dx, x), dy), &mean), &rstd)| {
        vectorize(|| {
            let of_mean = if is_centered { sum(features, |i| w[i] * dy[i]) / features as f32 } else { 0.0 };
            let projection = sum(features, |i| w[i] * dy[i] * (x[i] - mean));
            let factor = projection * rstd * rstd * rstd / features as f32;
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                *dx = rstd * (w * dy - of_mean) - factor * (x - mean);
            }
        });
    });
    Tensor::from_vec(dx, (tokens, features), &Device::Cpu)
}

impl NormActivations {
    /// The mean of each row, 0 for an RMSNorm.
    fn means(&self) -> Result<Vec<f32>> {
        match &self.mean {
            Some(mean) => Ok(read_f32(mean)?.to_vec()),
            None => Ok(vec![0.0; self.rstd.dims1()?]),
        }
    }
}
