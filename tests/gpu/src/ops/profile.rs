//! Profiles, which must count exactly the launched kernels and products.

use anyhow::{Context as _, Result, ensure};
use candle_core::DType;
use lora_ops::gemm::{no_trans, product, trans};
use lora_ops::norm::{self, NormParams};
use lora_ops::{add_assign, profile};
use lora_spec::NormKind;

use crate::check::{Check, TestBench};

pub(crate) fn checks() -> Vec<Check> {
    vec![Check::new("profile", profiled)]
}

fn profiled(bench: &TestBench) -> Result<String> {
    let (_, a) = bench.random("a", &[24, 40], 1.0, DType::BF16)?;
    let (_, b) = bench.random("b", &[56, 40], 1.0, DType::BF16)?;
    let (_, c) = bench.random("c", &[24, 56], 1.0, DType::F32)?;
    let (_, d) = bench.random("d", &[24, 40], 1.0, DType::BF16)?;
    let (_, weight) = bench.random("weight", &[40], 1.0, DType::F32)?;
    let run = || -> Result<()> {
        product(1.0, no_trans(&a), trans(&b), 1.0, &c)?;
        product(1.0, no_trans(&a), trans(&b), 0.0, &c)?;
        product(0.5, no_trans(&a), trans(&b), 2.0, &c)?;
        add_assign(&a, &d)?;
        norm::forward(&a, NormParams { kind: NormKind::Rms, weight: &weight, bias: None, eps: 1e-5 })?;
        Ok(())
    };
    run()?;
    profile::start();
    run()?;
    run()?;
    let timings = profile::finish(&bench.device)?;
    // Names, launches, bytes and operations of the two rounds.
    let product = (24 * 40 + 40 * 56) * 2;
    let want = [
        ("product 24x56x40 nt bf16>f32 +=", 4, 4 * (product + 2 * 24 * 56 * 4), 4 * 2 * 24 * 56 * 40),
        ("product 24x56x40 nt bf16>f32", 2, 2 * (product + 24 * 56 * 4), 2 * 2 * 24 * 56 * 40),
        ("pointwise_add_bf16", 2, 2 * 3 * 24 * 40 * 2, 0),
        ("rms_norm_forward_bf16", 2, 2 * (2 * 24 * 40 * 2 + 4 * 24 + 4 * 40), 0),
    ];
    ensure!(timings.len() == want.len(), "{timings:?}");
    for (timing, (name, count, bytes, flops)) in timings.iter().zip(want) {
        let got = (timing.name.as_str(), timing.count, timing.bytes, timing.flops);
        ensure!(got == (name, count, bytes, flops), "{got:?} instead of {:?}", (name, count, bytes, flops));
        ensure!(timing.milliseconds > 0.0 && timing.milliseconds < 1e5, "{timing:?}");
    }
    run()?;
    let after = profile::finish(&bench.device)?;
    ensure!(after.is_empty(), "launches after the end of the profile: {after:?}");
    let first = timings.first().context("no timing")?;
    Ok(format!("{} operations, {:.4} ms for the first", timings.len(), first.milliseconds))
}
