use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use crate::cpu::{TASK_ELEMENTS, read_f32, update_f32};
use crate::simd::{tanh, vectorize};

pub(super) fn add_assign(a: &Tensor, b: &Tensor) -> Result<()> {
    let a = &mut *update_f32(a, &[b])?;
    let b = &*read_f32(b)?;
    a.par_chunks_mut(TASK_ELEMENTS).zip(b.par_chunks(TASK_ELEMENTS)).for_each(|(a, b)| {
        vectorize(|| {
            for (a, b) in a.iter_mut().zip(b) {
                *a += b;
            }
        });
    });
    Ok(())
}

pub(super) fn scaled(x: &Tensor, factor: f32) -> Result<Tensor> {
    map(x, |x| factor * x)
}

pub(super) fn softcapped(x: &Tensor, cap: f32) -> Result<Tensor> {
    map(x, |x| cap * tanh(x / cap))
}

fn map(x: &Tensor, f: impl Fn(f32) -> f32 + Sync) -> Result<Tensor> {
    let shape = x.shape();
    let x = &*read_f32(x)?;
    let mut y = vec![0.0; x.len()];
    y.par_chunks_mut(TASK_ELEMENTS).zip(x.par_chunks(TASK_ELEMENTS)).for_each(|(y, x)| {
        vectorize(|| {
            for (y, x) in y.iter_mut().zip(x) {
                *y = f(*x);
            }
        });
    });
    Tensor::from_vec(y, shape, &Device::Cpu)
}

pub(super) fn round_into(from: &Tensor, to: &Tensor) -> Result<()> {
    // Checks the type.
    drop(read_f32(from)?);
    to.slice_set(&from.to_dtype(to.dtype())?, 0, 0)
}
