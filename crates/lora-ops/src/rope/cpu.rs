//! Rotation on the CPU, tokens in parallel.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::RopeTable;
use crate::cpu::{read_f32, update_f32};
use crate::simd::vectorize;

pub(super) fn rotate(table: &RopeTable, x: &Tensor, seq: usize, first: usize, direction: f32) -> Result<()> {
    let (features, head_dim, half) = (x.dims2()?.1, table.head_dim, table.half);
    let x = &mut *update_f32(x, &[&table.cos, &table.sin])?;
    let (cos, sin) = (&*read_f32(&table.cos)?, &*read_f32(&table.sin)?);
    x.par_chunks_mut(features).with_min_len(8).enumerate().for_each(|(token, row)| {
        let at = (first + token % seq) * half;
        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
        vectorize(|| {
            for head in row.chunks_exact_mut(head_dim) {
                if table.is_interleaved {
                    let pairs = head.as_chunks_mut::<2>().0.iter_mut();
                    for (([l, h], c), s) in pairs.zip(cos).zip(sin) {
                        let s = s * direction;
                        (*l, *h) = (*l * c - *h * s, *h * c + *l * s);
                    }
                    continue;
                }
                let (low, high) = head[..2 * half].split_at_mut(half);
                for (((l, h), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    let s = s * direction;
                    (*l, *h) = (*l * c - *h * s, *h * c + *l * s);
                }
            }
        });
    });
    Ok(())
}
