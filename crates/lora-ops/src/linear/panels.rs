//! The rows of a frozen weight on the CPU, as f32.

use candle_core::{DType, Result, Tensor};
use half::bf16;
use lora_spec::CPU_PANEL_ELEMENTS;
use rayon::prelude::*;

use super::Weight;
use crate::cpu::{ReadGuard, TASK_ELEMENTS, read, read_f32};
use crate::quant::{FourBitView, Int8View};
use crate::simd::vectorize;

/// The rows of a weight as f32, one panel at a time: an f32 weight is one panel, and other weights
/// are converted to f32 in a scratch buffer.
pub(crate) struct Panels<'a> {
    weight: WeightView<'a>,
    rows: usize,
    cols: usize,
}

enum WeightView<'a> {
    F32(ReadGuard<'a, f32>),
    Bf16(ReadGuard<'a, bf16>),
    FourBit(FourBitView<'a>),
    Int8(Int8View<'a>),
}

impl<'a> Panels<'a> {
    /// The panels of a weight on the CPU.
    pub(super) fn from_weight(weight: &'a Weight) -> Result<Self> {
        let (rows, cols) = weight.dims()?;
        let weight = match weight {
            Weight::Dense(weight) => return Self::from_tensor(weight),
            Weight::FourBit(weight) => WeightView::FourBit(FourBitView::new(weight)?),
            Weight::Int8(weight) => WeightView::Int8(Int8View::new(weight)?),
        };
        Ok(Self { weight, rows, cols })
    }

    /// The panels of an f32 or bf16 matrix on the CPU.
    pub(crate) fn from_tensor(weight: &'a Tensor) -> Result<Self> {
        let (rows, cols) = weight.dims2()?;
        let weight = match weight.dtype() {
            DType::F32 => WeightView::F32(read_f32(weight)?),
            DType::BF16 => WeightView::Bf16(read(weight)?),
            other => candle_core::bail!("a dense frozen weight must be f32 or bf16, not {other:?}"),
        };
        Ok(Self { weight, rows, cols })
    }

    /// Calls `f(first row, number of rows, their elements)` for each panel, in order.
    pub(crate) fn for_each(&self, mut f: impl FnMut(usize, usize, &[f32])) {
        let cols = self.cols;
        match &self.weight {
            WeightView::F32(weight) => f(0, self.rows, weight),
            WeightView::Bf16(weight) => {
                self.for_each_widened(f, |first, panel| widen(&weight[first * cols..][..panel.len()], panel));
            }
            WeightView::FourBit(weight) => {
                self.for_each_widened(f, |first, panel| weight.dequantize(first * cols, panel));
            }
            WeightView::Int8(weight) => {
                self.for_each_widened(f, |first, panel| weight.dequantize(first, panel));
            }
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
fn widen(from: &[bf16], to: &mut [f32]) {
    to.par_chunks_mut(TASK_ELEMENTS).zip(from.par_chunks(TASK_ELEMENTS)).for_each(|(to, from)| {
        vectorize(|| {
            for (to, from) in to.iter_mut().zip(from) {
                *to = f32::from_bits(u32::from(from.to_bits()) << 16);
            }
        });
    });
}
