use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::cpu::{MIN_PARALLEL_ELEMENTS, read_f32, update_f32};
use crate::simd::vectorize;

pub(super) fn add_assign(a: &Tensor, b: &Tensor) -> Result<()> {
    read_f32(b, |b| {
        update_f32(a, |a| {
            a.par_chunks_mut(MIN_PARALLEL_ELEMENTS).zip(b.par_chunks(MIN_PARALLEL_ELEMENTS)).for_each(
                |(a, b)| {
                    vectorize(|| {
                        for (a, b) in a.iter_mut().zip(b) {
                            *a += b;
                        }
                    });
                },
            );
        })
    })?
}

pub(super) fn round_into(from: &Tensor, to: &Tensor) -> Result<()> {
    read_f32(from, |_| ())?;
    to.slice_set(&from.to_dtype(to.dtype())?, 0, 0)
}
