//! The measurement of one case.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use lora_model::Base;
use lora_ops::profile;
use lora_train::memory_usage;

use crate::args::{Args, MicroBatchCase};
use crate::gpu_profile::GpuProfile;
use crate::host_profile::HostProfile;
use crate::proc_stats;
use crate::trainer::Trainer;

/// The number of steps of a GPU profile, which contains their means. They run after the measured
/// steps, because events between kernels slow a step down.
const PROFILED_STEPS: usize = 3;

/// The measurement of a case.
pub(crate) struct Measurement {
    pub(crate) trainable_parameters: u64,
    /// The time of each measured step, in seconds.
    pub(crate) seconds: Vec<f64>,
    pub(crate) cpu_seconds_per_step: f64,
    pub(crate) peak_memory_bytes: u64,
    /// The largest size of a GPU's memory pool, in bytes, including its unused memory.
    pub(crate) peak_reserved_memory_bytes: Option<u64>,
    /// The mean loss per token of the last measured step.
    pub(crate) loss: f64,
    /// The profile, if the device is a GPU and a profile was requested.
    pub(crate) gpu_profile: Option<GpuProfile>,
}

impl Measurement {
    /// Returns the median time of a step, in seconds.
    pub(crate) fn median_seconds(&self) -> f64 {
        median(&self.seconds)
    }
}

/// Trains the steps of `case` and measures them. `host_profile` is reset before the measured steps.
pub(crate) fn measure(
    base: &Arc<Base>,
    case: MicroBatchCase,
    args: &Args,
    host_profile: Option<&HostProfile>,
) -> Result<Measurement> {
    let device = base.device();
    let mut trainer = Trainer::new(base.clone(), case, args.activation_checkpointing.into_spec())?;
    let mut timed_step = |step: usize| -> Result<(f64, f64)> {
        let tokens = trainer.tokens(step);
        let started = Instant::now();
        let loss = tracing::trace_span!("between operations").in_scope(|| trainer.step(&tokens, step))?;
        device.synchronize()?;
        Ok((started.elapsed().as_secs_f64(), loss))
    };
    for step in 0..args.warmup {
        timed_step(step)?;
    }
    let cpu_before = proc_stats::cpu_seconds()?;
    host_profile.inspect(|profile| profile.reset());
    let end = args.warmup + args.steps.get();
    let mut seconds = Vec::with_capacity(args.steps.get());
    let mut loss = f64::NAN;
    for step in args.warmup..end {
        let (step_seconds, step_loss) = timed_step(step)?;
        seconds.push(step_seconds);
        loss = step_loss;
    }
    let cpu_seconds_per_step = (proc_stats::cpu_seconds()? - cpu_before) / args.steps.get() as f64;
    let memory = memory_usage(device)?;
    let peak_memory_bytes = memory.map_or_else(proc_stats::peak_rss_bytes, |memory| Ok(memory.peak_bytes))?;
    let gpu_profile = if args.profile && !device.is_cpu() {
        profile::start();
        let steps = (end..end + PROFILED_STEPS).map(&mut timed_step).collect::<Result<Vec<_>>>();
        let timings = profile::finish(device)?;
        let profiled: Vec<f64> = steps?.into_iter().map(|(step_seconds, _)| step_seconds).collect();
        let mean = profiled.iter().sum::<f64>() / profiled.len() as f64;
        Some(GpuProfile::new(timings, PROFILED_STEPS, mean, median(&seconds), &base.config, case))
    } else {
        None
    };
    Ok(Measurement {
        trainable_parameters: trainer.trainable_parameters(),
        seconds,
        cpu_seconds_per_step,
        peak_memory_bytes,
        peak_reserved_memory_bytes: memory.map(|memory| memory.peak_reserved_bytes),
        loss,
        gpu_profile,
    })
}

/// Returns the median of at least one number.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len() - 1;
    (sorted[last / 2] + sorted[last.div_ceil(2)]) / 2.0
}
