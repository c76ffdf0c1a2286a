//! Frozen linear layers: `y = x W^T + b`, and nothing but the gradient of `x` backward.

use candle_core::{DType, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::cpu::{GRAIN, filled, read, read_f32, update_f32};
use crate::gemm::{Mat, gemm};
use crate::simd::vectorize;

/// Elements of a bf16 weight that are widened to f32 at a time (4 MiB of f32).
const PANEL: usize = 1 << 20;

/// A frozen weight `[out_features, in_features]`, f32 or bf16, with an optional f32 bias `[out_features]`.
#[derive(Debug, Clone)]
pub struct FrozenLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl FrozenLinear {
    /// Takes `weight` `[out_features, in_features]` (f32 or bf16) and `bias` `[out_features]` (f32).
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (out_features, _) = weight.dims2()?;
        if !matches!(weight.dtype(), DType::F32 | DType::BF16) {
            candle_core::bail!("a frozen weight is f32 or bf16, not {:?}", weight.dtype());
        }
        if let Some(bias) = &bias
            && (bias.dims1()? != out_features || bias.dtype() != DType::F32)
        {
            candle_core::bail!("a bias of {out_features} f32 elements is needed, not {:?}", bias.shape());
        }
        Ok(Self { weight, bias })
    }

    /// The weight `[out_features, in_features]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `x` `[tokens, in_features]` to `x W^T + b` `[tokens, out_features]`.
    #[tracing::instrument(level = "trace", name = "linear forward", skip_all)]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, in_features) = x.dims2()?;
        let (out_features, expected) = self.weight.dims2()?;
        if in_features != expected {
            candle_core::bail!("a linear layer of {expected} features got {in_features}");
        }
        let bias = self.bias.as_ref().map(|b| read_f32(b, <[f32]>::to_vec)).transpose()?;
        let weight = Panels::of(&self.weight)?;
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

    /// `dy` `[tokens, out_features]` to `dx = dy W` `[tokens, in_features]`.
    pub fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        let dx = filled((dy.dims2()?.0, self.weight.dims2()?.1), |_| ())?;
        self.product(dy, &dx, 0.0)?;
        Ok(dx)
    }

    /// `dx += dy W`.
    pub fn backward_add(&self, dy: &Tensor, dx: &Tensor) -> Result<()> {
        self.product(dy, dx, 1.0)
    }

    #[tracing::instrument(level = "trace", name = "linear backward", skip_all)]
    fn product(&self, dy: &Tensor, dx: &Tensor, beta: f32) -> Result<()> {
        let (tokens, out_features) = dy.dims2()?;
        let (expected, in_features) = self.weight.dims2()?;
        if out_features != expected || dx.dims2()? != (tokens, in_features) {
            candle_core::bail!(
                "layer {:?}: gradient {:?} to {:?}",
                self.weight.shape(),
                dy.shape(),
                dx.shape()
            );
        }
        let weight = Panels::of(&self.weight)?;
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
