//! Gated activations.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use lora_ops::glu;
use lora_spec::ActivationFunction;

use crate::check::{Check, DTYPES, TestBench, compare, repeats, rounding, shifted};

const SHAPES: [[usize; 2]; 6] = [[1, 1], [3, 7], [1, 9], [5, 83], [33, 576], [2, 3001]];

pub(crate) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for activation in [ActivationFunction::Silu, ActivationFunction::GeluTanh] {
        for dtype in DTYPES {
            let name = |what: &str| format!("glu {activation:?} {what} {}", dtype.as_str());
            checks.push(Check::new(name("forward"), move |bench| forward(bench, activation, dtype)));
            checks.push(Check::new(name("backward"), move |bench| backward(bench, activation, dtype)));
        }
    }
    checks
}

fn forward(bench: &TestBench, activation: ActivationFunction, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for shape in SHAPES {
        let (gate, up) = (bench.random("gate", &shape, 9.0, dtype)?, bench.random("up", &shape, 1.0, dtype)?);
        let got = repeats(|| Ok(vec![glu::forward(&gate.1, &up.1, activation)?]))?;
        detail = compare("y", &got[0], &glu::forward(&gate.0, &up.0, activation)?, rounding(dtype))?;
        let of_shifted = glu::forward(&shifted(&gate.1)?, &up.1, activation)?;
        compare("y of a shifted gate", &of_shifted, &got[0], 0.0)?;
    }
    for shape in SHAPES {
        let (x, dy) = (bench.random("x", &shape, 9.0, dtype)?, bench.random("dy", &shape, 1.0, dtype)?);
        let run = |x: &Tensor, dy: &Tensor| -> Result<Vec<Tensor>> {
            let dx = glu::activation_backward(x, dy, activation)?;
            Ok(vec![glu::activation_forward(x, activation)?, dx])
        };
        let (got, want) = (repeats(|| run(&x.1, &dy.1))?, run(&x.0, &dy.0)?);
        let of_shifted = run(&shifted(&x.1)?, &shifted(&dy.1)?)?;
        for (i, what) in ["activation", "its gradient"].into_iter().enumerate() {
            compare(what, &got[i], &want[i], rounding(dtype))?;
            compare(&format!("{what} of a shifted input"), &of_shifted[i], &got[i], 0.0)?;
        }
    }
    // Powers and exponentials of these gates overflow.
    let extreme = Tensor::new(&[[-1e38_f32, -200.0, -90.0, -0.0, 90.0, 200.0, 1e38]], &Device::Cpu)?;
    let gate = bench.on_both(&extreme, dtype)?;
    let ones = bench.on_both(&extreme.ones_like()?, dtype)?;
    let got = glu::backward(&gate.1, &ones.1, &ones.1, activation)?;
    let want = glu::backward(&gate.0, &ones.0, &ones.0, activation)?;
    compare("slope of extreme gates", &got.0, &want.0, rounding(dtype))?;
    compare("y of extreme gates", &got.1, &want.1, rounding(dtype))?;
    Ok(detail)
}

fn backward(bench: &TestBench, activation: ActivationFunction, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for shape in SHAPES {
        let (gate, up) = (bench.random("gate", &shape, 9.0, dtype)?, bench.random("up", &shape, 1.0, dtype)?);
        let dy = bench.random("dy", &shape, 1.0, dtype)?;
        let run = |gate: &Tensor, up: &Tensor, dy: &Tensor| -> Result<Vec<Tensor>> {
            let (dgate, dup) = glu::backward(gate, up, dy, activation)?;
            Ok(vec![dgate, dup])
        };
        let got = repeats(|| run(&gate.1, &up.1, &dy.1))?;
        let want = run(&gate.0, &up.0, &dy.0)?;
        let of_shifted = run(&gate.1, &up.1, &shifted(&dy.1)?)?;
        detail.clear();
        for (i, what) in ["dgate", "dup"].into_iter().enumerate() {
            detail += &format!("{} ", compare(what, &got[i], &want[i], rounding(dtype))?);
            compare(&format!("{what} of a shifted dy"), &of_shifted[i], &got[i], 0.0)?;
        }
    }
    Ok(detail.trim_end().to_owned())
}
