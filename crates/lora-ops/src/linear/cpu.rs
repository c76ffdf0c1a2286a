//! Products with a frozen weight on the CPU; a bf16 weight is widened a panel at a time.

use candle_core::{DType, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::FrozenLinear;
use crate::cpu::{GRAIN, filled, read, read_f32, update_f32};
use crate::gemm::{Mat, gemm};
use crate::simd::vectorize;

/// Elements of a bf16 weight that are widened to f32 at a time (4 MiB of f32).
const PANEL: usize = 1 << 20;

pub(super) fn forward(layer: &FrozenLinear, x: &Tensor) -> Result<Tensor> {
    let ((tokens, in_features), out_features) = (x.dims2()?, layer.weight.dims2()?.0);
    let bias = layer.bias.as_ref().map(|b| read_f32(b, <[f32]>::to_vec)).transpose()?;
    let weight = Panels::of(&layer.weight)?;
    read_f32(x, |x| {
        filled((tokens, out_features), |y| {
            weight.for_each(|first, rows, panel| {
                let w = Mat::new(panel, rows, in_features);
                gemm(1.0, Mat::new(x, tokens, in_features), w.t(), 0.0, &mut y[first..], out_features);
            });
            if let Some(bias) = &bias {
                y.par_chunks_mut(out_features).for_each(|row| {
                    vectorize(|| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
                });
            }
        })
    })?
}

/// `dx = dy W + beta dx`.
pub(super) fn backward(layer: &FrozenLinear, dy: &Tensor, dx: &Tensor, beta: f32) -> Result<()> {
    let ((tokens, out_features), in_features) = (dy.dims2()?, layer.weight.dims2()?.1);
    let weight = Panels::of(&layer.weight)?;
    read_f32(dy, |dy| {
        update_f32(dx, |dx| {
            weight.for_each(|first, rows, panel| {
                let dy = Mat::new(dy, tokens, out_features).columns(first, rows);
                let beta = if first == 0 { beta } else { 1.0 };
                gemm(1.0, dy, Mat::new(panel, rows, in_features), beta, dx, in_features);
            });
        })
    })?
}

/// A weight's rows as f32, a panel at a time: an f32 weight is one panel, a bf16 weight is widened into a scratch buffer.
pub(crate) struct Panels<'a> {
    weight: &'a Tensor,
    rows: usize,
    cols: usize,
}

impl<'a> Panels<'a> {
    /// Takes a contiguous f32 or bf16 matrix.
    pub(crate) fn of(weight: &'a Tensor) -> Result<Self> {
        let (rows, cols) = weight.dims2()?;
        match weight.dtype() {
            DType::F32 => read::<f32, _>(weight, |_| ())?,
            DType::BF16 => read::<bf16, _>(weight, |_| ())?,
            other => candle_core::bail!("a frozen weight is f32 or bf16, not {other:?}"),
        }
        Ok(Self { weight, rows, cols })
    }

    /// Calls `f(first row, number of rows, their elements)` for each panel in order.
    pub(crate) fn for_each(&self, mut f: impl FnMut(usize, usize, &[f32])) {
        // Both reads were tried in `of`: exactly one of them applies.
        if read::<f32, _>(self.weight, |w| f(0, self.rows, w)).is_ok() {
            return;
        }
        let _ = read::<bf16, _>(self.weight, |w| {
            let rows = (PANEL / self.cols.max(1)).clamp(1, self.rows.max(1));
            let mut scratch = vec![0.0; rows * self.cols];
            for (i, panel) in w.chunks(rows * self.cols).enumerate() {
                let scratch = &mut scratch[..panel.len()];
                widen(panel, scratch);
                f(i * rows, panel.len() / self.cols, scratch);
            }
        });
    }
}

/// bf16 to f32, exact.
pub(crate) fn widen(from: &[bf16], to: &mut [f32]) {
    to.par_chunks_mut(GRAIN).zip(from.par_chunks(GRAIN)).for_each(|(to, from)| {
        vectorize(|| {
            for (to, from) in to.iter_mut().zip(from) {
                *to = f32::from_bits(u32::from(from.to_bits()) << 16);
            }
        });
    });
}
