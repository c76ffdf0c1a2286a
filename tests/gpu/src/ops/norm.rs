//! Norms of a tensor and of a sum, and their gradients with and without the residual's gradient.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use lora_ops::norm::{self, NormParams};
use lora_spec::NormKind;

use crate::check::{Check, DTYPES, TestBench, compare, repeats, rounding, shifted, values};

const SHAPES: [[usize; 2]; 8] = [[1, 1], [1, 2], [3, 7], [5, 64], [2, 83], [37, 576], [3, 4096], [2, 9001]];

/// Large enough that the gradient of few features is not a difference of nearly equal numbers.
const EPS: f64 = 0.1;

fn without_bias(kind: NormKind, weight: &Tensor) -> NormParams<'_> {
    NormParams { kind, weight, bias: None, eps: EPS }
}

pub(crate) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for (kind, norm) in [(NormKind::Rms, "rms_norm"), (NormKind::Layer, "layer_norm")] {
        for dtype in DTYPES {
            let name = |what: &str| format!("{norm} {what} {}", dtype.as_str());
            checks.push(Check::new(name("forward"), move |bench| forward(bench, kind, dtype)));
            checks.push(Check::new(name("of a sum"), move |bench| add_forward(bench, kind, dtype)));
            checks.push(Check::new(name("backward"), move |bench| backward(bench, kind, dtype)));
        }
    }
    checks
}

fn forward(bench: &TestBench, kind: NormKind, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for shape in SHAPES {
        let x = bench.random("x", &shape, 2.0, dtype)?;
        let w = bench.random("w", &shape[1..], 1.0, DType::F32)?;
        let b = bench.random("b", &shape[1..], 1.0, DType::F32)?;
        let run = |x: &Tensor, weight: &Tensor, bias: &Tensor| -> Result<Vec<Tensor>> {
            let params = NormParams { kind, weight, bias: Some(bias), eps: EPS };
            let (y, saved) = norm::forward(x, params)?;
            Ok(vec![norm::recompute(&saved, x, params)?, y])
        };
        let got = repeats(|| run(&x.1, &w.1, &b.1))?;
        ensure!(values(&got[0])? == values(&got[1])?, "recompute gives different bits for {shape:?}");
        let of_shifted = run(&shifted(&x.1)?, &shifted(&w.1)?, &shifted(&b.1)?)?;
        ensure!(values(&of_shifted[1])? == values(&got[1])?, "the bits of {shape:?} depend on the address");
        detail = compare("y", &got[1], &run(&x.0, &w.0, &b.0)?[1], rounding(dtype))?;
    }
    Ok(detail)
}

fn add_forward(bench: &TestBench, kind: NormKind, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for shape in SHAPES {
        let (x, residual) = (bench.random("x", &shape, 2.0, dtype)?, bench.random("r", &shape, 1.0, dtype)?);
        let w = bench.random("w", &shape[1..], 1.0, DType::F32)?;
        let got = repeats(|| {
            let sum = x.1.copy()?;
            let (y, saved) = norm::add_forward(&sum, &residual.1, without_bias(kind, &w.1))?;
            Ok(vec![norm::recompute(&saved, &sum, without_bias(kind, &w.1))?, y, sum])
        })?;
        ensure!(values(&got[0])? == values(&got[1])?, "recompute gives different bits for {shape:?}");
        let sum = bench.on_both(&x.0.add(&residual.0)?, dtype)?.0;
        compare("sum", &got[2], &sum, 0.0)?;
        detail = compare("y", &got[1], &norm::forward(&sum, without_bias(kind, &w.0))?.0, rounding(dtype))?;
    }
    Ok(detail)
}

fn backward(bench: &TestBench, kind: NormKind, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for shape in SHAPES {
        let (x, dy) = (bench.random("x", &shape, 2.0, dtype)?, bench.random("dy", &shape, 1.0, dtype)?);
        let residual = bench.random("residual", &shape, 1.0, dtype)?;
        let w = bench.random("w", &shape[1..], 1.0, DType::F32)?;
        let run = |x: &Tensor, w: &Tensor, dy: &Tensor, residual: &Tensor| -> Result<Vec<Tensor>> {
            let (_, saved) = norm::forward(x, without_bias(kind, w))?;
            let alone = norm::backward(&saved, x, without_bias(kind, w), dy, None)?;
            Ok(vec![alone, norm::backward(&saved, x, without_bias(kind, w), dy, Some(residual))?])
        };
        let got = repeats(|| run(&x.1, &w.1, &dy.1, &residual.1))?;
        let of_shifted = run(&x.1, &w.1, &shifted(&dy.1)?, &shifted(&residual.1)?)?;
        ensure!(values(&of_shifted[1])? == values(&got[1])?, "the bits of {shape:?} depend on the address");
        let want = run(&x.0, &w.0, &dy.0, &residual.0)?;
        compare("dx with a residual", &got[1], &want[1], rounding(dtype))?;
        detail = compare("dx", &got[0], &want[0], rounding(dtype))?;
    }
    Ok(detail)
}
