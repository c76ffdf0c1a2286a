//! AdamW: every operation of it is rounded as IEEE 754 says on either device, so the bits are the same.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use lora_ops::adamw::{AdamW, State};
use lora_ops::adamw_8bit;
use lora_ops::reduce::fingerprint;

use crate::check::{Bench, Check, values};

pub(crate) fn checks() -> Vec<Check> {
    vec![Check::new("adamw f32", steps), Check::new("adamw, moments in 8 bits", steps_8bit)]
}

/// Tensors with moments in 8 bits, whose last block is not full, between such with f32 ones; and each kind alone.
fn steps_8bit(bench: &Bench) -> Result<String> {
    let adamw = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    for sizes in [&[5000, 100, 4096, 33, 8191][..], &[4096], &[7, 4095]] {
        let mut end = 0;
        let ranges: Vec<_> = sizes
            .iter()
            .map(|size| {
                end += size;
                end - size..end
            })
            .collect();
        let params = bench.random("params", &[end], 1.0, DType::F32)?;
        let mut states =
            [adamw_8bit::State::new(&ranges, &Device::Cpu)?, adamw_8bit::State::new(&ranges, &bench.device)?];
        for t in 1..5 {
            let gradient = bench.random(
                &format!("gradient {t}"),
                &[end],
                10.0_f32.powi(2 - t as i32 * 3),
                DType::F32,
            )?;
            adamw.step_8bit(t, &params.0, &states[0], &gradient.0, 0.7)?;
            adamw.step_8bit(t, &params.1, &states[1], &gradient.1, 0.7)?;
            ensure!(values(&params.1)? == values(&params.0)?, "parameters after step {t} of {sizes:?}");
            let hash = |state: &adamw_8bit::State| fingerprint(&state.tensors().map(|(_, tensor)| tensor));
            ensure!(hash(&states[0])? == hash(&states[1])?, "moments after step {t} of {sizes:?}");
            // As a checkpoint does it, from one device to the other.
            let saved = |name: &str| -> candle_core::Result<Tensor> {
                let tensors = states[1].tensors();
                let tensor = tensors.iter().find(|(of, _)| *of == name).map(|(_, tensor)| *tensor);
                tensor.ok_or_else(|| candle_core::Error::Msg(name.to_owned()))?.to_device(&Device::Cpu)
            };
            let read = adamw_8bit::State::from_tensors(&ranges, &bench.device, saved)?;
            states[1] = read;
        }
    }
    Ok("exact".into())
}

fn steps(bench: &Bench) -> Result<String> {
    let adamw = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    // With views that lie on no boundary.
    for (n, skip) in [(1, 0), (6, 1), (100_003, 0), (1025, 3)] {
        let random = |name: &str, scale: f32| bench.random(name, &[n + skip], scale, DType::F32);
        let (params, m, v) = (random("params", 1.0)?, random("m", 0.0)?, random("v", 0.0)?);
        for t in 1..4 {
            // Gradients over many magnitudes: tiny ones square to numbers below the smallest normal one.
            let gradient = random(&format!("gradient {t}"), 10.0_f32.powi(-(t as i32 - 1) * 10))?;
            let step = |params: &Tensor, m: &Tensor, v: &Tensor, gradient: &Tensor| -> Result<()> {
                let view = |x: &Tensor| x.narrow(0, skip, n);
                let (params, m, v) = (view(params)?, view(m)?, view(v)?);
                let state = State { params: &params, m: &m, v: &v };
                Ok(adamw.step(t, state, &view(gradient)?, 0.7)?)
            };
            step(&params.0, &m.0, &v.0, &gradient.0)?;
            step(&params.1, &m.1, &v.1, &gradient.1)?;
            for (what, (want, got)) in
                [("parameters", &params), ("first moments", &m), ("second moments", &v)]
            {
                ensure!(values(got)? == values(want)?, "{what} after step {t} of {n} elements");
            }
        }
    }
    Ok("exact".into())
}
