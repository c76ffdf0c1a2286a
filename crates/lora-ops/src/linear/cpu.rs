//! Products with a frozen weight on the CPU. A weight that is not f32 is widened or dequantized one
//! panel at a time.

use candle_core::{DType, Device, Result, Tensor};
use half::bf16;
use lora_spec::CPU_PANEL_ELEMENTS;
use rayon::prelude::*;

use super::{FrozenLinear, Weight};
use crate::cpu::{MIN_PARALLEL_ELEMENTS, read, read_f32, update_f32};
use crate::gemm::{Mat, gemm};
use crate::quant::{FourBit, FourBitView, Int8, dequantize_int8, read_int8};
use crate::simd::vectorize;

pub(super) fn forward(layer: &FrozenLinear, x: &Tensor) -> Result<Tensor> {
    let ((tokens, in_features), out_features) = (x.dims2()?, layer.weight.dims()?.0);
    let bias = layer.bias.as_ref().map(|b| read_f32(b, <[f32]>::to_vec)).transpose()?;
    let weight = layer.weight.panels()?;
    let mut y = vec![0.0; tokens * out_features];
    read_f32(x, |x| {
        weight.for_each(|first, rows, panel| {
            let w = Mat::new(panel, rows, in_features);
            gemm(1.0, Mat::new(x, tokens, in_features), w.t(), 0.0, &mut y[first..], out_features);
        })
    })??;
    if let Some(bias) = &bias {
        y.par_chunks_mut(out_features).for_each(|row| {
            vectorize(|| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
        });
    }
    Tensor::from_vec(y, (tokens, out_features), &Device::Cpu)
}

/// Computes `dx = dy W + beta dx`.
pub(super) fn backward(layer: &FrozenLinear, dy: &Tensor, dx: &Tensor, beta: f32) -> Result<()> {
    let ((tokens, out_features), in_features) = (dy.dims2()?, layer.weight.dims()?.1);
    let weight = layer.weight.panels()?;
    read_f32(dy, |dy| {
        update_f32(dx, |dx| {
            weight.for_each(|first, rows, panel| {
                let dy = Mat::new(dy, tokens, out_features).columns(first, rows);
                let beta = if first == 0 { beta } else { 1.0 };
                gemm(1.0, dy, Mat::new(panel, rows, in_features), beta, dx, in_features);
            })
        })
    })??
}

impl Weight {
    fn panels(&self) -> Result<Panels<'_>> {
        let (rows, cols) = self.dims()?;
        Ok(match self {
            Self::Dense(weight) => Panels::from_tensor(weight)?,
            Self::FourBit(weight) => Panels { storage: WeightStorage::FourBit(weight), rows, cols },
            Self::Int8(weight) => Panels { storage: WeightStorage::Int8(weight), rows, cols },
        })
    }
}

/// The rows of a weight as f32, one panel at a time: an f32 weight is one panel, and other weights
/// are converted to f32 in a scratch buffer.
pub(crate) struct Panels<'a> {
    storage: WeightStorage<'a>,
    rows: usize,
    cols: usize,
}

enum WeightStorage<'a> {
    F32(&'a Tensor),
    Bf16(&'a Tensor),
    FourBit(&'a FourBit),
    Int8(&'a Int8),
}

impl<'a> Panels<'a> {
    /// The panels of an f32 or bf16 matrix.
    pub(crate) fn from_tensor(weight: &'a Tensor) -> Result<Self> {
        let (rows, cols) = weight.dims2()?;
        let storage = match weight.dtype() {
            DType::F32 => WeightStorage::F32(weight),
            DType::BF16 => WeightStorage::Bf16(weight),
            other => candle_core::bail!("a dense frozen weight must be f32 or bf16, not {other:?}"),
        };
        Ok(Self { storage, rows, cols })
    }

    /// Calls `f(first row, number of rows, their elements)` for each panel, in order.
    pub(crate) fn for_each(&self, mut f: impl FnMut(usize, usize, &[f32])) -> Result<()> {
        let cols = self.cols;
        match self.storage {
            WeightStorage::F32(weight) => read_f32(weight, |weight| f(0, self.rows, weight)),
            WeightStorage::Bf16(weight) => read::<bf16, _>(weight, |weight| {
                self.for_each_widened(f, |first, panel| widen(&weight[first * cols..][..panel.len()], panel));
            }),
            WeightStorage::FourBit(weight) => FourBitView::read(weight, |weight| {
                self.for_each_widened(f, |first, panel| weight.dequantize(first * cols, panel));
            }),
            WeightStorage::Int8(weight) => read_int8(weight, |codes, scales| {
                self.for_each_widened(f, |first, panel| {
                    dequantize_int8(&codes[first * cols..], &scales[first..], cols, panel);
                });
            }),
        }
    }

    /// Calls `f` for panels that `fill(first row, elements)` writes.
    fn for_each_widened(&self, mut f: impl FnMut(usize, usize, &[f32]), fill: impl Fn(usize, &mut [f32])) {
        let height = (CPU_PANEL_ELEMENTS / self.cols.max(1)).clamp(1, self.rows.max(1));
        let mut scratch = vec![0.0; height * self.cols];
        for first in (0..self.rows).step_by(height) {
            let rows = height.min(self.rows - first);
            let panel = &mut scratch[..rows * self.cols];
            fill(first, panel);
            f(first, rows, panel);
        }
    }
}

/// Converts bf16 to f32, exactly.
pub(crate) fn widen(from: &[bf16], to: &mut [f32]) {
    to.par_chunks_mut(MIN_PARALLEL_ELEMENTS).zip(from.par_chunks(MIN_PARALLEL_ELEMENTS)).for_each(
        |(to, from)| {
            vectorize(|| {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = f32::from_bits(u32::from(from.to_bits()) << 16);
                }
            });
        },
    );
}
