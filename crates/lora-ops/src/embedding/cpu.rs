//! Rows of an f32 or bf16 matrix, as f32.

use candle_core::{DType, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::cpu::{new_filled, read};

pub(super) fn forward(weight: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    let features = weight.dims2()?.1;
    let row = |token: u32| token as usize * features..(token as usize + 1) * features;
    let shape = (tokens.len(), features);
    match weight.dtype() {
        DType::F32 => read::<f32, _>(weight, |w| {
            new_filled(shape, |y| {
                y.par_chunks_mut(features).zip(tokens).for_each(|(y, t)| y.copy_from_slice(&w[row(*t)]));
            })
        })?,
        DType::BF16 => read::<bf16, _>(weight, |w| {
            new_filled(shape, |y| {
                y.par_chunks_mut(features).zip(tokens).for_each(|(y, t)| {
                    y.iter_mut().zip(&w[row(*t)]).for_each(|(y, w)| *y = w.to_f32());
                });
            })
        })?,
        other => candle_core::bail!("an embedding must be f32 or bf16, not {other:?}"),
    }
}
