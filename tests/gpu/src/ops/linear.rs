//! Matrix products and frozen layers, dense and quantized.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use lora_ops::gemm::{MatrixOperand, no_trans, product, trans};
use lora_ops::linear::{FrozenLinear, Weight};
use lora_ops::quant::{Codebook, FourBit, Int8};
use lora_ops::transfer::to_device;
use lora_spec::gpu_panel_rows;

use super::quant::random_four_bit;
use crate::check::{Check, DTYPES, TestBench, compare, repeats, tolerance};

pub(crate) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for dtype in DTYPES {
        let name = |what: &str| format!("{what} {}", dtype.as_str());
        checks.push(Check::new(name("product"), move |bench| products(bench, dtype)));
        checks.push(Check::new(name("linear forward"), move |bench| forward(bench, dtype)));
        checks.push(Check::new(name("linear backward"), move |bench| backward(bench, dtype)));
        checks.push(Check::new(name("quantized linear"), move |bench| quantized(bench, dtype)));
    }
    checks.push(Check::new("quantized linear, in panels".to_owned(), panels));
    checks
}

/// Checks products with each operand plain and transposed, with `alpha` and `beta`, and an f32
/// result.
fn products(bench: &TestBench, dtype: DType) -> Result<String> {
    let (m, n, k) = (33, 50, 70);
    let c = bench.random("c", &[m, n], 1.0, DType::F32)?.0;
    let mut worst = String::new();
    for (a_shape, a_t) in [([m, k], false), ([k, m], true)] {
        for (b_shape, b_t) in [([k, n], false), ([n, k], true)] {
            let (a, b) = (bench.random("a", &a_shape, 1.0, dtype)?, bench.random("b", &b_shape, 1.0, dtype)?);
            let run = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
                fn factor(x: &Tensor, transposed: bool) -> MatrixOperand<'_> {
                    if transposed { trans(x) } else { no_trans(x) }
                }
                let c = to_device(&c.copy()?, a.device())?;
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

fn layer(bench: &TestBench, dtype: DType, bias: bool) -> Result<(FrozenLinear, FrozenLinear)> {
    let w = bench.random("w", &[90, 64], 0.3, dtype)?;
    let b = bias.then(|| bench.random("bias", &[90], 1.0, DType::F32)).transpose()?;
    let (b_cpu, b_gpu) = b.unzip();
    Ok((FrozenLinear::new(w.0, b_cpu)?, FrozenLinear::new(w.1, b_gpu)?))
}

fn forward(bench: &TestBench, dtype: DType) -> Result<String> {
    let x = bench.random("x", &[37, 64], 1.0, dtype)?;
    let mut detail = String::new();
    for bias in [false, true] {
        let (cpu, gpu) = layer(bench, dtype, bias)?;
        let got = repeats(|| Ok(vec![gpu.forward(&x.1)?]))?;
        detail = compare("y", &got[0], &cpu.forward(&x.0)?, tolerance(dtype))?;
    }
    Ok(detail)
}

fn backward(bench: &TestBench, dtype: DType) -> Result<String> {
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

/// Checks every format of a quantized weight, with rows that start at any offset in a block and in
/// a byte.
fn quantized(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for (rows, cols) in [(90, 64), (17, 33), (300, 100)] {
        let values = bench.random("w", &[rows, cols], 0.3, DType::F32)?.0.flatten_all()?.to_vec1()?;
        let four_bit = |codebook, nested| FourBit::quantize(&values, (rows, cols), codebook, nested);
        let weights: [Weight; 4] = [
            four_bit(Codebook::Nf4, false)?.into(),
            four_bit(Codebook::Nf4, true)?.into(),
            four_bit(Codebook::Fp4, true)?.into(),
            Int8::quantize(&values, (rows, cols))?.into(),
        ];
        for weight in weights {
            detail = both_ways(bench, weight, (rows, cols), 37, dtype)?;
        }
    }
    Ok(detail)
}

/// Checks a weight with three panels, of which the last has one row.
fn panels(bench: &TestBench) -> Result<String> {
    let shape = (513, 131_073);
    let weight = random_four_bit(bench, shape, Codebook::Nf4, 64, Some(256))?;
    ensure!(gpu_panel_rows(shape.0, shape.1, 4) == 256, "the weight's panels do not have 256 rows");
    both_ways(bench, weight.into(), shape, 1, DType::F32)
}

fn both_ways(
    bench: &TestBench,
    weight: Weight,
    (rows, cols): (usize, usize),
    tokens: usize,
    dtype: DType,
) -> Result<String> {
    let bias = bench.random("bias", &[rows], 1.0, DType::F32)?;
    let (x, dy) =
        (bench.random("x", &[tokens, cols], 1.0, dtype)?, bench.random("dy", &[tokens, rows], 1.0, dtype)?);
    let gpu = FrozenLinear::new(weight.to_device(&bench.device)?, Some(bias.1))?;
    let cpu = FrozenLinear::new(weight, Some(bias.0))?;
    let run = |layer: &FrozenLinear, x: &Tensor, dy: &Tensor| -> Result<[Tensor; 2]> {
        let dx = layer.backward(dy)?;
        layer.backward_add(dy, &dx)?;
        Ok([layer.forward(x)?, dx])
    };
    let want = run(&cpu, &x.0, &dy.0)?;
    let got = repeats(|| Ok(run(&gpu, &x.1, &dy.1)?.to_vec()))?;
    compare("y", &got[0], &want[0], tolerance(dtype))?;
    compare("dx", &got[1], &want[1], tolerance(dtype))
}
