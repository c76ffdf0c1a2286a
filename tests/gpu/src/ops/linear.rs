//! Frozen layers and products.

use anyhow::Result;
use candle_core::{DType, Tensor};
use lora_ops::gemm::{Factor, of, product, t};
use lora_ops::linear::FrozenLinear;

use crate::check::{Bench, Check, DTYPES, compare, repeats, tolerance};

pub(crate) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for dtype in DTYPES {
        let name = |what: &str| format!("{what} {}", dtype.as_str());
        checks.push(Check::new(name("product"), move |bench| products(bench, dtype)));
        checks.push(Check::new(name("linear forward"), move |bench| forward(bench, dtype)));
        checks.push(Check::new(name("linear backward"), move |bench| backward(bench, dtype)));
    }
    checks
}

/// Each side as it is and transposed, with `alpha` and `beta`, into f32.
fn products(bench: &Bench, dtype: DType) -> Result<String> {
    let (m, n, k) = (33, 50, 70);
    let c = bench.random("c", &[m, n], 1.0, DType::F32)?.0;
    let mut worst = String::new();
    for (a_shape, a_t) in [([m, k], false), ([k, m], true)] {
        for (b_shape, b_t) in [([k, n], false), ([n, k], true)] {
            let (a, b) = (bench.random("a", &a_shape, 1.0, dtype)?, bench.random("b", &b_shape, 1.0, dtype)?);
            let run = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
                fn factor(x: &Tensor, transposed: bool) -> Factor<'_> {
                    if transposed { t(x) } else { of(x) }
                }
                let c = c.copy()?.to_device(a.device())?;
                product(0.5, factor(a, a_t), factor(b, b_t), 2.0, &c)?;
                Ok(c)
            };
            let want = run(&a.0, &b.0)?;
            let got = repeats(|| Ok(vec![run(&a.1, &b.1)?]))?;
            worst = compare("c", &got[0], &want, 1e-5)?;
        }
    }
    Ok(worst)
}

fn layer(bench: &Bench, dtype: DType, bias: bool) -> Result<(FrozenLinear, FrozenLinear)> {
    let w = bench.random("w", &[90, 64], 0.3, dtype)?;
    let b = bias.then(|| bench.random("bias", &[90], 1.0, DType::F32)).transpose()?;
    let (b_cpu, b_gpu) = b.unzip();
    Ok((FrozenLinear::new(w.0, b_cpu)?, FrozenLinear::new(w.1, b_gpu)?))
}

fn forward(bench: &Bench, dtype: DType) -> Result<String> {
    let x = bench.random("x", &[37, 64], 1.0, dtype)?;
    let mut said = String::new();
    for bias in [false, true] {
        let (cpu, gpu) = layer(bench, dtype, bias)?;
        let got = repeats(|| Ok(vec![gpu.forward(&x.1)?]))?;
        said = compare("y", &got[0], &cpu.forward(&x.0)?, tolerance(dtype))?;
    }
    Ok(said)
}

fn backward(bench: &Bench, dtype: DType) -> Result<String> {
    let (cpu, gpu) = layer(bench, dtype, false)?;
    let dy = bench.random("dy", &[37, 90], 1.0, dtype)?;
    let run = |layer: &FrozenLinear, dy: &Tensor| -> Result<Tensor> {
        let dx = layer.backward(dy)?;
        layer.backward_add(dy, &dx)?;
        Ok(dx)
    };
    let got = repeats(|| Ok(vec![run(&gpu, &dy.1)?]))?;
    compare("dx", &got[0], &run(&cpu, &dy.0)?, tolerance(dtype))
}
