//! Token embedding.

use candle_core::{DType, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::cpu::{filled, read};

/// Rows `tokens` of `weight` `[vocab, features]` (f32 or bf16), as f32 `[tokens, features]`.
#[tracing::instrument(level = "trace", name = "embedding", skip_all)]
pub fn forward(weight: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    let (vocab, features) = weight.dims2()?;
    if let Some(token) = tokens.iter().find(|t| **t as usize >= vocab) {
        candle_core::bail!("token {token} is outside the vocabulary of {vocab}");
    }
    let row = |token: u32| token as usize * features..(token as usize + 1) * features;
    let shape = (tokens.len(), features);
    match weight.dtype() {
        DType::F32 => read::<f32, _>(weight, |w| {
            filled(shape, |y| {
                y.par_chunks_mut(features).zip(tokens).for_each(|(y, t)| y.copy_from_slice(&w[row(*t)]));
            })
        })?,
        DType::BF16 => read::<bf16, _>(weight, |w| {
            filled(shape, |y| {
                y.par_chunks_mut(features).zip(tokens).for_each(|(y, t)| {
                    y.iter_mut().zip(&w[row(*t)]).for_each(|(y, w)| *y = w.to_f32());
                });
            })
        })?,
        other => candle_core::bail!("an embedding is f32 or bf16, not {other:?}"),
    }
}
