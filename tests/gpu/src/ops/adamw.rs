//! AdamW: every operation of it is rounded as IEEE 754 says on either device, so the bits are the same.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use lora_ops::adamw::{AdamW, State};

use crate::check::{Bench, Check, values};

pub(crate) fn checks() -> Vec<Check> {
    vec![Check::new("adamw f32", steps)]
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
