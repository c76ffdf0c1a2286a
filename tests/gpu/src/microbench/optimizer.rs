//! The operations of a step on an adapter's parameters and gradients, in f32.

use lora_ops::adamw::{self, AdamWSettings, AdamWTensors};
use lora_ops::pointwise::round_into;
use lora_ops::reduce::{fingerprint, scale, sum_of_squares};

use candle_core::DType;
use lora_ops::transfer::zeros;

use super::inputs::{ADAPTER, BenchInputs};
use super::row::BenchRow;

pub(super) fn rows(inputs: &BenchInputs) -> Vec<BenchRow> {
    let n = inputs.size(ADAPTER);
    let name = |what: &str| format!("{what} {n}");
    vec![
        BenchRow::new(name("adamw"), 28 * n, move |inputs| {
            let (params, gradient) = (inputs.f32(&[n])?, inputs.f32(&[n])?);
            let moments = || zeros(n, DType::F32, inputs.device());
            let (m, v) = (moments()?, moments()?);
            let adamw = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
            let coefficients = adamw.coefficients(1e-4, 1, 1.0);
            Ok(Box::new(move || {
                let state = AdamWTensors { params: &params, m: &m, v: &v };
                Ok(adamw::step(&coefficients, state, &gradient)?)
            }))
        }),
        BenchRow::new(name("fingerprint of 3 x"), 12 * n, move |inputs| {
            let parts = [inputs.f32(&[n])?, inputs.f32(&[n])?, inputs.f32(&[n])?];
            Ok(Box::new(move || Ok(fingerprint(&parts.each_ref()).map(drop)?)))
        })
        .of_kernels("reduce_fingerprint_"),
        BenchRow::new(name("sum of squares"), 4 * n, move |inputs| {
            let x = inputs.f32(&[n])?;
            Ok(Box::new(move || Ok(sum_of_squares(&x).map(drop)?)))
        })
        .of_kernels("reduce_sum_of_squares_"),
        BenchRow::new(name("scale"), 8 * n, move |inputs| {
            let x = inputs.f32(&[n])?;
            Ok(Box::new(move || Ok(scale(&x, 0.5)?)))
        }),
        BenchRow::new(name("f32 to bf16"), 6 * n, move |inputs| {
            let (from, to) = (inputs.f32(&[n])?, inputs.bf16(&[n])?);
            Ok(Box::new(move || Ok(round_into(&from, &to)?)))
        }),
    ]
}
