//! The language-model head fused with its loss.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use lora_ops::cross_entropy::{Head, Loss, Targets, forward_backward};
use lora_spec::Philox;

use crate::check::{Check, DTYPES, TestBench, compare, repeats, tolerance, values};

pub(crate) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for dtype in DTYPES {
        let name = |what: &str| format!("cross-entropy {what} {}", dtype.as_str());
        checks.push(Check::new(name("small"), move |bench| small(bench, dtype)));
        checks.push(Check::new(name("vocabularies"), move |bench| vocabularies(bench, dtype)));
        checks.push(Check::new(name("not finite"), move |bench| not_finite(bench, dtype)));
    }
    // 67 million logits, more than one chunk has.
    checks.push(Check::new("cross-entropy two chunks bf16", |bench| {
        let problem = LossCase::new(bench, 257, 1, 262_145, DType::BF16, |_| 0.5)?;
        problem.compare(&problem.on_gpu(true)?)
    }));
    checks
}

struct LossCase {
    x: (Tensor, Tensor),
    head: (Tensor, Tensor),
    targets: (Targets, Targets),
    softcap: Option<f32>,
    dtype: DType,
}

impl LossCase {
    fn new(
        bench: &TestBench,
        rows: usize,
        features: usize,
        vocab: usize,
        dtype: DType,
        weight: impl Fn(usize) -> f32,
    ) -> Result<Self> {
        let philox = Philox::new(bench.seed, "targets");
        let tokens: Vec<u32> =
            (0..rows as u32).map(|row| philox.below(vocab as u64, [row, 0, 0, 0]) as u32).collect();
        let weights: Vec<f32> = (0..rows).map(weight).collect();
        Ok(Self {
            x: bench.random("x", &[rows, features], 2.0, dtype)?,
            head: bench.random("head", &[vocab, features], 1.0, dtype)?,
            targets: (
                Targets::new(&tokens, &weights, &Device::Cpu)?,
                Targets::new(&tokens, &weights, &bench.device)?,
            ),
            softcap: None,
            dtype,
        })
    }

    fn on_cpu(&self) -> Result<Loss> {
        let head = Head { weight: &self.head.0, softcap: self.softcap };
        Ok(forward_backward(&self.x.0, head, &self.targets.0, true)?)
    }

    fn on_gpu(&self, gradient: bool) -> Result<Loss> {
        let head = Head { weight: &self.head.1, softcap: self.softcap };
        Ok(forward_backward(&self.x.1, head, &self.targets.1, gradient)?)
    }

    /// Compares a result and its gradient with the CPU's.
    fn compare(&self, got: &Loss) -> Result<String> {
        let want = self.on_cpu()?;
        // Logits and losses are not rounded to bf16.
        let losses = compare("losses", &got.row_losses, &want.row_losses, 2e-6)?;
        let (sum, want_sum) = (got.sum()?, want.sum()?);
        ensure!((sum - want_sum).abs() <= 2e-6 * want_sum.abs(), "sum {sum} instead of {want_sum}");
        ensure!(got.weight_sum == want.weight_sum, "the sums of weights differ");
        let (Some(dx), Some(want)) = (&got.dx, &want.dx) else { anyhow::bail!("no gradient") };
        ensure!(dx.dtype() == self.dtype, "the gradient is {:?}", dx.dtype());
        // The gradient is a sum over the vocabulary in f32, whose order differs.
        let limit = tolerance(self.dtype).max(1e-6 * (self.head.0.dim(0)? as f64).sqrt());
        Ok(format!("{losses}, {}", compare("dx", dx, want, limit)?))
    }

    /// Does the same as [`Self::compare`], and checks that a repetition gives the same bits and
    /// that the losses do not depend on whether the gradient is computed.
    fn check(&self) -> Result<String> {
        let got = repeats(|| {
            let loss = self.on_gpu(true)?;
            Ok([loss.row_losses].into_iter().chain(loss.dx).collect())
        })?;
        let without = self.on_gpu(false)?;
        ensure!(without.dx.is_none(), "the gradient was computed although it was not requested");
        ensure!(values(&without.row_losses)? == values(&got[0])?, "the losses differ without the gradient");
        self.compare(&self.on_gpu(true)?)
    }
}

fn small(bench: &TestBench, dtype: DType) -> Result<String> {
    let weight = |row: usize| [1.0, 0.0, 0.25, 2.5][row % 4];
    let mut detail = String::new();
    // In bf16 the gradient of a single feature may be a difference of nearly equal numbers.
    let smallest = if dtype == DType::F32 { (1, 1, 2) } else { (1, 6, 2) };
    for (rows, features, vocab) in [smallest, (1, 7, 31), (5, 3, 1), (13, 65, 1001)] {
        for softcap in [None, Some(1.5)] {
            let case = LossCase::new(bench, rows, features, vocab, dtype, weight)?;
            detail = LossCase { softcap, ..case }.check()?;
        }
    }
    // In this case no row has a target.
    let loss = LossCase::new(bench, 3, 5, 7, dtype, |_| 0.0)?.on_gpu(true)?;
    ensure!(loss.sum()? == 0.0 && loss.weight_sum == 0.0, "the loss without targets is not 0");
    let Some(dx) = loss.dx else { anyhow::bail!("no gradient without targets") };
    let is_zero = dx.dims() == [3, 5] && values(&dx)?.iter().all(|d| *d == 0.0);
    ensure!(is_zero, "the gradient without targets is not 0");
    Ok(detail)
}

/// Checks vocabularies of published models, and the largest one.
fn vocabularies(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for vocab in [50_257, 128_256, 262_144] {
        detail = LossCase::new(bench, 3, 9, vocab, dtype, |_| 1.0)?.check()?;
    }
    Ok(detail)
}

/// Checks that logits for which `exp` overflows give finite losses, and that a NaN in a row makes
/// the loss NaN unless the row has no weight.
fn not_finite(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut problem = LossCase::new(bench, 3, 4, 700, dtype, |row| [1.0, 0.0, 1.0][row])?;
    let large = bench.on_both(&problem.x.0.affine(1e4, 0.0)?, dtype)?;
    let x = std::mem::replace(&mut problem.x, large);
    let (loss, want) = (problem.on_gpu(true)?, problem.on_cpu()?);
    let detail = compare("losses", &loss.row_losses, &want.row_losses, 1e-5)?;
    let Some(dx) = loss.dx else { anyhow::bail!("no gradient") };
    // The gradient is not compared, because the differences of such logits are rounded too much.
    ensure!(values(&dx)?.iter().all(|d| d.is_finite()), "the gradient is not finite");
    let with_nan = |row: usize| -> Result<f64> {
        let mut values = x.0.to_vec2::<f32>()?;
        values[row].fill(f32::NAN);
        let x = bench.on_both(&Tensor::new(values, &Device::Cpu)?, dtype)?.1;
        Ok(forward_backward(&x, &problem.head.1, &problem.targets.1, true)?.sum()?)
    };
    ensure!(with_nan(1)?.is_finite(), "a row without weight changes the loss");
    ensure!(with_nan(2)?.is_nan(), "the loss of a row with NaN is finite");
    Ok(detail)
}
