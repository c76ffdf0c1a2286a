use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Numbers, State};
use crate::cpu::{GRAIN, read_f32, update_f32};
use crate::simd::vectorize;

pub(super) fn step(numbers: &Numbers, state: State, gradient: &Tensor) -> Result<()> {
    let State { params, m, v } = state;
    read_f32(gradient, |gradient| {
        update_f32(params, |params| {
            update_f32(m, |m| update_f32(v, |v| update(numbers, params, m, v, gradient)))
        })
    })???
}

fn update(numbers: &Numbers, params: &mut [f32], m: &mut [f32], v: &mut [f32], gradient: &[f32]) {
    let &Numbers { factor, rest1, beta2, rest2, correction2, eps, decay, step_size, .. } = numbers;
    let moments = m.par_chunks_mut(GRAIN).zip(v.par_chunks_mut(GRAIN));
    let chunks = params.par_chunks_mut(GRAIN).zip(moments).zip(gradient.par_chunks(GRAIN));
    chunks.for_each(|((params, (m, v)), gradient)| {
        vectorize(|| {
            for (((p, m), v), g) in params.iter_mut().zip(m).zip(v).zip(gradient) {
                let g = g * factor;
                *m += rest1 * (g - *m);
                *v = *v * beta2 + rest2 * (g * g);
                let denominator = v.sqrt() / correction2 + eps;
                *p = *p * decay - step_size * (*m / denominator);
            }
        });
    });
}
