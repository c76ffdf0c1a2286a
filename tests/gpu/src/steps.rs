//! Checks of training on the GPU: steps agree with the CPU's, a repetition and a resume give the
//! same bits, and jobs release their memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use candle_core::Device;
use lora_collective::CancelToken;
use lora_model::Base;
use lora_spec::{BaseDtype, InitLoraWeights, JobFiles, JobSpec, Optim};
use lora_train::{Run, StepOutcome};

use crate::check::{Check, TestBench};

/// Largest relative difference of a loss or gradient norm between the GPU in bf16 and the CPU in
/// f32 with the same bf16 base.
const BF16_TOLERANCE: f64 = 2e-2;
const F32_TOLERANCE: f64 = 1e-4;

/// The checks. `example` is a directory with `base/` and `train.jsonl`.
pub(crate) fn checks(example: &Path) -> Vec<Check> {
    let check = |name: &'static str, run: fn(&TestBench, &Path) -> Result<String>| {
        let example: PathBuf = example.to_owned();
        Check::new(name, move |bench| run(bench, &example))
    };
    vec![
        check("steps as on the CPU, f32", |bench, example| {
            like_the_cpu(bench, &job(example, BaseDtype::F32))
        }),
        check("steps as on the CPU, bf16", |bench, example| {
            like_the_cpu(bench, &job(example, BaseDtype::Bf16))
        }),
        check("packed steps as on the CPU, f32", |bench, example| {
            like_the_cpu(bench, &packed(example, BaseDtype::F32))
        }),
        check("packed steps as on the CPU, bf16", |bench, example| {
            like_the_cpu(bench, &packed(example, BaseDtype::Bf16))
        }),
        check("steps with PiSSA as on the CPU, f32", |bench, example| {
            from_the_base(bench, example, BaseDtype::F32)
        }),
        check("steps with PiSSA as on the CPU, bf16", |bench, example| {
            from_the_base(bench, example, BaseDtype::Bf16)
        }),
        check("the same bits again, with dropout", repeats),
        check("the same bits after a resume", resumes),
        check("the same bits with paged moments", paged),
        check("memory after three jobs", memory),
    ]
}

fn job(example: &Path, dtype: BaseDtype) -> JobSpec {
    let mut job = JobSpec { name: "check".into(), ..JobSpec::default() };
    job.model.base = example.join("base");
    job.model.dtype = dtype;
    job.data.train = example.join("train.jsonl").into();
    job.adapter.r = 4;
    job.training.max_steps = Some(3);
    job.training.global_batch_size = 6;
    job.training.micro_batch_size = 2;
    job.training.learning_rate = 1e-3;
    job
}

/// A job whose rows have several samples each.
fn packed(example: &Path, dtype: BaseDtype) -> JobSpec {
    let mut job = job(example, dtype);
    job.data.packing = true;
    job.data.max_length = 128;
    job.training.global_batch_size = 16;
    job
}

fn prepare(job: &JobSpec, base: &Arc<Base>) -> Result<Run> {
    Ok(Run::prepare(job, &JobFiles::from_job(job), base.clone(), &CancelToken::new())?)
}

fn base(job: &JobSpec, device: &Device) -> Result<Arc<Base>> {
    Ok(Arc::new(Base::load(&job.model.base.as_path().into(), job.base_layout(), device)?))
}

fn finish(run: &mut Run) -> Result<Vec<lora_train::StepRecord>> {
    while run.step(|| false)?.outcome == StepOutcome::Continue {}
    Ok(run.history().to_vec())
}

/// Checks training with PiSSA. The export verifies that the result, which includes the initial
/// term, gives the trained logits.
fn from_the_base(bench: &TestBench, example: &Path, dtype: BaseDtype) -> Result<String> {
    let mut job = job(example, dtype);
    job.adapter.init_lora_weights = InitLoraWeights::Pissa;
    like_the_cpu(bench, &job)
}

fn like_the_cpu(bench: &TestBench, job: &JobSpec) -> Result<String> {
    let mut run = prepare(job, &base(job, &bench.device)?)?;
    let on_gpu = finish(&mut run)?;
    run.export()?;
    let on_cpu = finish(&mut prepare(job, &base(job, &Device::Cpu)?)?)?;
    let most = if job.model.dtype == BaseDtype::Bf16 { BF16_TOLERANCE } else { F32_TOLERANCE };
    let mut worst = 0.0_f64;
    for (gpu, cpu) in on_gpu.iter().zip(&on_cpu) {
        for (what, gpu_value, cpu_value) in
            [("loss", gpu.loss, cpu.loss), ("gradient norm", gpu.grad_norm, cpu.grad_norm)]
        {
            let (got, want) = gpu_value.zip(cpu_value).context("a step was not finite")?;
            let error = (got - want).abs() / want;
            ensure!(error <= most, "step {}: {what} is {got} instead of {want}", gpu.step);
            worst = worst.max(error);
        }
    }
    let loss = on_gpu.last().and_then(|record| record.loss).context("no step")?;
    Ok(format!("{} steps to a loss of {loss:.4}, off by {worst:.1e}", on_gpu.len()))
}

fn repeats(bench: &TestBench, example: &Path) -> Result<String> {
    let mut job = job(example, BaseDtype::Bf16);
    job.adapter.lora_dropout = 0.1;
    let base = base(&job, &bench.device)?;
    let first = finish(&mut prepare(&job, &base)?)?;
    let second = finish(&mut prepare(&job, &base)?)?;
    ensure!(first == second, "{first:?} and then {second:?}");
    Ok(format!("state {}", first.last().context("no step")?.state))
}

fn resumes(bench: &TestBench, example: &Path) -> Result<String> {
    let job = job(example, BaseDtype::Bf16);
    let base = base(&job, &bench.device)?;
    let uninterrupted = finish(&mut prepare(&job, &base)?)?;
    let mut run = prepare(&job, &base)?;
    run.step(|| false)?;
    let checkpoint = run.checkpoint()?;
    let mut resumed = prepare(&job, &base)?;
    resumed.restore(&checkpoint)?;
    let resumed_steps = finish(&mut resumed)?;
    ensure!(uninterrupted == resumed_steps, "{uninterrupted:?} without and {resumed_steps:?} with a resume");
    let files = resumed.export()?;
    Ok(format!("{} files exported and verified", files.len()))
}

/// Checks paged moments in both formats, also after a resume, and that they are not in the GPU's
/// memory.
fn paged(bench: &TestBench, example: &Path) -> Result<String> {
    let mut job = job(example, BaseDtype::Bf16);
    // With this rank every matrix is large enough for moments in 8 bits.
    job.adapter.r = 32;
    let base = base(&job, &bench.device)?;
    let mut details = Vec::new();
    for (plain, paged, bytes) in
        [(Optim::Adamw, Optim::PagedAdamw32bit, 8), (Optim::Adamw8bit, Optim::PagedAdamw8bit, 2)]
    {
        let mut prepared = |optim| -> Result<(Run, u64)> {
            job.training.optim = optim;
            let before = used(bench)?;
            let run = prepare(&job, &base)?;
            Ok((run, used(bench)? - before))
        };
        let (mut unpaged, with_moments) = prepared(plain)?;
        let (mut first, without) = prepared(paged)?;
        let bytes = bytes * first.facts().trainable_parameters;
        let saved = with_moments.saturating_sub(without);
        ensure!(saved >= bytes, "{paged:?} saves {saved} bytes of {bytes}");
        let want = finish(&mut unpaged)?;
        first.step(|| false)?;
        let checkpoint = first.checkpoint()?;
        let got = finish(&mut first)?;
        ensure!(got == want, "{plain:?} {want:?}, {paged:?} {got:?}");
        let (mut resumed, _) = prepared(paged)?;
        resumed.restore(&checkpoint)?;
        ensure!(finish(&mut resumed)? == want, "{paged:?} differs after a resume");
        details.push(format!("{paged:?} saves {saved} bytes"));
    }
    Ok(details.join(", "))
}

fn used(bench: &TestBench) -> Result<u64> {
    bench.device.synchronize()?;
    Ok(lora_train::memory_usage(&bench.device)?.context("the GPU's memory cannot be read")?.used_bytes)
}

fn memory(bench: &TestBench, example: &Path) -> Result<String> {
    let job = job(example, BaseDtype::Bf16);
    let base = base(&job, &bench.device)?;
    let mut after = Vec::new();
    for _ in 0..3 {
        finish(&mut prepare(&job, &base)?)?;
        after.push(used(bench)?);
    }
    ensure!(after[2] == after[0], "{after:?} bytes are in use after the first, second and third job");
    Ok(format!("{} bytes, as after the first job", after[2]))
}
