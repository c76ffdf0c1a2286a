//! Times training steps at the shapes of published models with random weights: LoRA r = 16 on every
//! linear layer except the head, every position labelled, one micro-batch per step, and the
//! clipping and AdamW of a training run.
//!
//! `benches/peft_step.py` is the same step with PEFT + Transformers. `benches/compare.sh` runs
//! both.

mod args;
mod gpu_profile;
mod host_profile;
mod measure;
mod proc_stats;
mod published_models;
mod report;
mod trainer;
mod utilization;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use lora_model::Base;
use lora_ops::ceilings::Ceilings;
use lora_ops::device::reset_peak_memory;

use crate::args::Args;
use crate::measure::measure;
use crate::report::CaseReport;

fn main() -> Result<()> {
    let args = Args::parse();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads.get()).build()?;
    pool.install(|| run(&args))
}

/// Measures the cases one after the other. If a case fails, its error is printed and the next case
/// runs.
///
/// # Errors
/// The error of the last case, if no case succeeded.
fn run(args: &Args) -> Result<()> {
    let config = published_models::model_config(&args.model)?;
    let device = lora_train::open_device(args.device)?;
    let host_profile = (args.profile && device.is_cpu()).then(host_profile::install).transpose()?;
    let ceilings = (args.profile && !device.is_cpu())
        .then(|| Ceilings::measure(&device, args.ceilings_scale.get()))
        .transpose()
        .context("measuring the device's ceilings")?;
    // Releases the memory of the ceilings before the base is allocated.
    reset_peak_memory(&device)?;
    let started = Instant::now();
    let base = Base::random(config, args.format(), 0, &device).context("making the random base")?;
    device.synchronize()?;
    let load_seconds = started.elapsed().as_secs_f64();
    let report = CaseReport {
        args,
        device: lora_ops::device::describe(&device)?,
        load_seconds,
        base: &Arc::new(base),
        host_profile: host_profile.as_ref(),
        ceilings,
    };
    let mut outcome = Ok(());
    let mut succeeded = false;
    for (number, case) in args.cases().into_iter().enumerate() {
        if number > 0 {
            // The peaks of the earlier cases must not count for this case.
            reset_peak_memory(&device)?;
            proc_stats::reset_peak_rss();
        }
        match measure(report.base, case, args, host_profile.as_ref()) {
            Ok(measurement) => {
                succeeded = true;
                report.print(case, &measurement);
            }
            Err(error) => {
                report.print_error(case, &error);
                outcome = Err(error);
            }
        }
    }
    if succeeded { Ok(()) } else { outcome }
}
