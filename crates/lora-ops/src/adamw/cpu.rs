use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{AdamWTensors, Coefficients};
use crate::cpu::{MIN_PARALLEL_ELEMENTS, read_f32, update_f32};
use crate::simd::vectorize;

pub(super) fn step(coefficients: &Coefficients, state: AdamWTensors, gradient: &Tensor) -> Result<()> {
    let AdamWTensors { params, m, v } = state;
    read_f32(gradient, |gradient| {
        update_f32(params, |params| {
            update_f32(m, |m| update_f32(v, |v| update(coefficients, params, m, v, gradient)))
        })
    })???
}

fn update(coefficients: &Coefficients, params: &mut [f32], m: &mut [f32], v: &mut [f32], gradient: &[f32]) {
    let c = *coefficients;
    let moments = m.par_chunks_mut(MIN_PARALLEL_ELEMENTS).zip(v.par_chunks_mut(MIN_PARALLEL_ELEMENTS));
    let chunks = params
        .par_chunks_mut(MIN_PARALLEL_ELEMENTS)
        .zip(moments)
        .zip(gradient.par_chunks(MIN_PARALLEL_ELEMENTS));
    chunks.for_each(|((params, (m, v)), gradient)| {
        vectorize(|| {
            for (((p, m), v), g) in params.iter_mut().zip(m).zip(v).zip(gradient) {
                let g = g * c.factor;
                *m += c.one_minus_beta1 * (g - *m);
                *v = *v * c.beta2 + c.one_minus_beta2 * (g * g);
                let denominator = v.sqrt() / c.sqrt_bias_correction2 + c.eps;
                *p = *p * c.decay - c.step_size * (*m / denominator);
            }
        });
    });
}
