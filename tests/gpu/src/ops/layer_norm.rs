//! Layer norm of a tensor and of a sum, and its gradient with and without the residual's gradient.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use lora_ops::layer_norm::{self, LayerNormParams};

use crate::check::{Check, DTYPES, TestBench, compare, repeats, rounding, shifted, values};

const SHAPES: [[usize; 2]; 7] = [[1, 2], [3, 7], [5, 64], [2, 83], [37, 576], [3, 4096], [2, 9001]];

/// Large enough that the gradient of two features is not a difference of nearly equal numbers.
const EPS: f64 = 0.1;

fn params<'a>(weight: &'a Tensor, bias: Option<&'a Tensor>) -> LayerNormParams<'a> {
    LayerNormParams { weight, bias, eps: EPS }
}

pub(crate) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for dtype in DTYPES {
        let name = |what: &str| format!("layer_norm {what} {}", dtype.as_str());
        checks.push(Check::new(name("forward"), move |bench| forward(bench, dtype)));
        checks.push(Check::new(name("of a sum"), move |bench| add_forward(bench, dtype)));
        checks.push(Check::new(name("backward"), move |bench| backward(bench, dtype)));
    }
    checks
}

fn forward(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for shape in SHAPES {
        let x = bench.random("x", &shape, 2.0, dtype)?;
        let w = bench.random("w", &shape[1..], 1.0, DType::F32)?;
        let b = bench.random("b", &shape[1..], 1.0, DType::F32)?;
        let run = |x: &Tensor, w: &Tensor, b: &Tensor| -> Result<Vec<Tensor>> {
            let (y, saved) = layer_norm::forward(x, params(w, Some(b)))?;
            Ok(vec![layer_norm::recompute(&saved, x, params(w, Some(b)))?, y])
        };
        let got = repeats(|| run(&x.1, &w.1, &b.1))?;
        ensure!(values(&got[0])? == values(&got[1])?, "recompute gives different bits for {shape:?}");
        let of_shifted = run(&shifted(&x.1)?, &shifted(&w.1)?, &shifted(&b.1)?)?;
        ensure!(values(&of_shifted[1])? == values(&got[1])?, "the bits of {shape:?} depend on the address");
        detail = compare("y", &got[1], &run(&x.0, &w.0, &b.0)?[1], rounding(dtype))?;
    }
    Ok(detail)
}

fn add_forward(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for shape in SHAPES {
        let (x, residual) = (bench.random("x", &shape, 2.0, dtype)?, bench.random("r", &shape, 1.0, dtype)?);
        let w = bench.random("w", &shape[1..], 1.0, DType::F32)?;
        let got = repeats(|| {
            let sum = x.1.copy()?;
            let (y, saved) = layer_norm::add_forward(&sum, &residual.1, params(&w.1, None))?;
            Ok(vec![layer_norm::recompute(&saved, &sum, params(&w.1, None))?, y, sum])
        })?;
        ensure!(values(&got[0])? == values(&got[1])?, "recompute gives different bits for {shape:?}");
        let sum = bench.on_both(&x.0.add(&residual.0)?, dtype)?.0;
        compare("sum", &got[2], &sum, 0.0)?;
        detail = compare("y", &got[1], &layer_norm::forward(&sum, params(&w.0, None))?.0, rounding(dtype))?;
    }
    Ok(detail)
}

fn backward(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for shape in SHAPES {
        let (x, dy) = (bench.random("x", &shape, 2.0, dtype)?, bench.random("dy", &shape, 1.0, dtype)?);
        let residual = bench.random("residual", &shape, 1.0, dtype)?;
        let w = bench.random("w", &shape[1..], 1.0, DType::F32)?;
        let run = |x: &Tensor, w: &Tensor, dy: &Tensor, residual: &Tensor| -> Result<Vec<Tensor>> {
            let (_, saved) = layer_norm::forward(x, params(w, None))?;
            let alone = layer_norm::backward(&saved, x, params(w, None), dy, None)?;
            Ok(vec![alone, layer_norm::backward(&saved, x, params(w, None), dy, Some(residual))?])
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
