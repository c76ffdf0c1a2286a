//! Sums, multiples, zeros and copies of long vectors, which must have the bits of the CPU's f32
//! results.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use lora_ops::add_assign;
use lora_ops::pointwise::{round_into, scaled, softcapped, zero};
use lora_ops::transfer::to_device;

use crate::check::{Check, DTYPES, TestBench, compare, values};

/// Number of elements of a view, and number of skipped elements before it. Some views do not start
/// at an aligned address.
const VIEWS: [(usize, usize); 5] = [(1, 0), (3, 1), (1027, 0), (1027, 2), (100_003, 4)];

pub(crate) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for dtype in DTYPES {
        checks.push(Check::new(format!("add {}", dtype.as_str()), move |bench| add(bench, dtype)));
        checks.push(Check::new(format!("scale {}", dtype.as_str()), move |bench| scale(bench, dtype)));
        checks.push(Check::new(format!("round {}", dtype.as_str()), move |bench| round(bench, dtype)));
        checks.push(Check::new(format!("zero {}", dtype.as_str()), move |bench| zeros(bench, dtype)));
    }
    checks.push(Check::new("soft cap", softcap));
    checks
}

fn softcap(bench: &TestBench) -> Result<String> {
    let mut detail = String::new();
    for (n, skip) in VIEWS {
        let x = bench.random("x", &[n + skip + 1], 3.0, DType::F32)?;
        let want = softcapped(&x.0.narrow(0, skip, n)?, 2.0)?;
        detail = compare("bounded", &softcapped(&x.1.narrow(0, skip, n)?, 2.0)?, &want, 1e-6)?;
    }
    Ok(detail)
}

/// Compares the whole tensor, because elements around the view must not change.
fn add(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for (n, skip) in VIEWS {
        let a = bench.random("a", &[n + skip + 1], 1.0, dtype)?;
        let b = bench.random("b", &[n + skip + 1], 1.0, dtype)?;
        add_assign(&a.0.narrow(0, skip, n)?, &b.0.narrow(0, skip, n)?)?;
        add_assign(&a.1.narrow(0, skip, n)?, &b.1.narrow(0, skip, n)?)?;
        // The CPU's sum is rounded to the type of the GPU's sum.
        let want = a.0.to_dtype(dtype)?.to_dtype(DType::F32)?;
        detail = compare("sum", &a.1, &want, 0.0)?;
    }
    Ok(detail)
}

fn scale(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for (n, skip) in VIEWS {
        let x = bench.random("x", &[n + skip + 1], 1.0, dtype)?;
        let want = scaled(&x.0.narrow(0, skip, n)?, 0.22)?.to_dtype(dtype)?.to_dtype(DType::F32)?;
        detail = compare("multiple", &scaled(&x.1.narrow(0, skip, n)?, 0.22)?, &want, 0.0)?;
    }
    Ok(detail)
}

fn round(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for (n, skip) in VIEWS {
        let from = bench.random("from", &[n + skip + 1], 1.0, DType::F32)?;
        let to = Tensor::zeros(n + skip + 1, dtype, from.0.device())?;
        let on_gpu = to_device(&to, &bench.device)?;
        round_into(&from.0.narrow(0, skip, n)?, &to.narrow(0, skip, n)?)?;
        round_into(&from.1.narrow(0, skip, n)?, &on_gpu.narrow(0, skip, n)?)?;
        detail = compare("copy", &on_gpu, &to, 0.0)?;
    }
    Ok(detail)
}

fn zeros(bench: &TestBench, dtype: DType) -> Result<String> {
    for (n, skip) in VIEWS {
        let (want, x) = bench.random("x", &[n + skip + 1], 1.0, dtype)?;
        zero(&want.narrow(0, skip, n)?)?;
        zero(&x.narrow(0, skip, n)?)?;
        ensure!(values(&x)? == values(&want)?, "{n} elements from {skip} on differ");
    }
    Ok("exact".into())
}
