//! Rows of an f32 or bf16 matrix, as f32.

use candle_core::{DType, Device, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::cpu::{read, read_f32};

pub(super) fn forward(weight: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    let features = weight.dims2()?.1;
    let row = |token: u32| token as usize * features..(token as usize + 1) * features;
    let mut y = vec![0.0; tokens.len() * features];
    let rows = y.par_chunks_mut(features).zip(tokens);
    match weight.dtype() {
        DType::F32 => {
            let w = &*read_f32(weight)?;
            rows.for_each(|(y, t)| y.copy_from_slice(&w[row(*t)]));
        }
        DType::BF16 => {
            let w = &*read::<bf16>(weight)?;
            rows.for_each(|(y, t)| y.iter_mut().zip(&w[row(*t)]).for_each(|(y, w)| *y = w.to_f32()));
        }
        other => candle_core::bail!("an embedding must be f32 or bf16, not {other:?}"),
    }
    Tensor::from_vec(y, (tokens.len(), features), &Device::Cpu)
}
