//! Products with a frozen weight on the CPU.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::{FrozenLinear, Panels};
use crate::cpu::{read_f32, update_f32};
use crate::gemm::{Mat, gemm};
use crate::simd::vectorize;

pub(super) fn forward(layer: &FrozenLinear, x: &Tensor) -> Result<Tensor> {
    let ((tokens, in_features), out_features) = (x.dims2()?, layer.weight.dims()?.0);
    let (x, weight) = (&*read_f32(x)?, Panels::from_weight(&layer.weight)?);
    let mut y = vec![0.0; tokens * out_features];
    weight.for_each(|first, rows, panel| {
        let w = Mat::new(panel, rows, in_features);
        gemm(1.0, Mat::new(x, tokens, in_features), w.t(), 0.0, &mut y[first..], out_features);
    });
    if let Some(bias) = &layer.bias {
        let bias = &*read_f32(bias)?;
        y.par_chunks_mut(out_features).for_each(|row| {
            vectorize(|| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
        });
    }
    Tensor::from_vec(y, (tokens, out_features), &Device::Cpu)
}

/// Computes `dx = dy W + beta dx`.
pub(super) fn backward(layer: &FrozenLinear, dy: &Tensor, dx: &Tensor, beta: f32) -> Result<()> {
    let ((tokens, out_features), in_features) = (dy.dims2()?, layer.weight.dims()?.1);
    let dx = &mut *update_f32(dx, &[&[dy], &*layer.weight.tensors()].concat())?;
    let (dy, weight) = (&*read_f32(dy)?, Panels::from_weight(&layer.weight)?);
    weight.for_each(|first, rows, panel| {
        let dy = Mat::new(dy, tokens, out_features).columns(first, rows);
        let beta = if first == 0 { beta } else { 1.0 };
        gemm(1.0, dy, Mat::new(panel, rows, in_features), beta, dx, in_features);
    });
    Ok(())
}
