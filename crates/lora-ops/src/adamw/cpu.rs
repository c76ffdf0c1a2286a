use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{AdamWTensors, Coefficients};
use crate::cpu::{TASK_ELEMENTS, read_f32, update_f32};
use crate::simd::vectorize;

pub(super) fn step(coefficients: &Coefficients, state: AdamWTensors, gradient: &Tensor) -> Result<()> {
    let AdamWTensors { params, m, v } = state;
    let params = &mut *update_f32(params, &[m, v, gradient])?;
    let m = &mut *update_f32(m, &[v, gradient])?;
    let v = &mut *update_f32(v, &[gradient])?;
    update(coefficients, params, m, v, &read_f32(gradient)?);
    Ok(())
}

fn update(coefficients: &Coefficients, params: &mut [f32], m: &mut [f32], v: &mut [f32], gradient: &[f32]) {
    let c = *coefficients;
    let moments = m.par_chunks_mut(TASK_ELEMENTS).zip(v.par_chunks_mut(TASK_ELEMENTS));
    let chunks = params.par_chunks_mut(TASK_ELEMENTS).zip(moments).zip(gradient.par_chunks(TASK_ELEMENTS));
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
