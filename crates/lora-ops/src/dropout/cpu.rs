//! Dropout on the CPU, tokens in parallel.

use candle_core::{Device, Result, Tensor};
use lora_spec::Philox;
use rayon::prelude::*;

use super::Dropout;
use crate::cpu::read_f32;

pub(super) fn apply(dropout: &Dropout, x: &Tensor) -> Result<Tensor> {
    let (tokens, features) = x.dims2()?;
    let &Dropout { philox, step, probability, .. } = dropout;
    let keep = dropout.keep_scale();
    let x = &*read_f32(x)?;
    let mut y = vec![0.0; tokens * features];
    let keys = dropout.tokens.host().par_chunks_exact(2);
    let rows = y.par_chunks_mut(features).zip(x.par_chunks(features)).zip(keys);
    rows.for_each(|((y, x), key)| {
        for (block, (y, x)) in y.chunks_mut(4).zip(x.chunks(4)).enumerate() {
            let words = philox.words([step, key[0], key[1], block as u32]);
            for ((y, x), word) in y.iter_mut().zip(x).zip(words) {
                *y = if Philox::unit(word) < probability { 0.0 } else { x * keep };
            }
        }
    });
    Tensor::from_vec(y, (tokens, features), &Device::Cpu)
}
