//! The report of a case: a line of JSON, or text.

use std::sync::Arc;

use anyhow::Error;
use lora_model::Base;
use lora_ops::ceilings::Ceilings;
use lora_plan::{MemoryEstimate, MicroBatchShape, ModelFootprint, TrainingWorkload, row_flops};
use lora_spec::{AdapterSpec, DeviceKind, Optim};
use serde_json::{Value, json};

use crate::args::{Args, Dtype, MicroBatchCase, name};
use crate::host_profile::HostProfile;
use crate::measure::Measurement;
use crate::utilization;

/// The values that the reports of all cases share, and the methods that print a report.
pub(crate) struct CaseReport<'a> {
    pub(crate) args: &'a Args,
    /// The description of the device.
    pub(crate) device: String,
    pub(crate) load_seconds: f64,
    pub(crate) base: &'a Arc<Base>,
    /// The profile, if the device is the CPU and a profile was requested.
    pub(crate) host_profile: Option<&'a HostProfile>,
    /// The ceilings, if the device is a GPU and a profile was requested.
    pub(crate) ceilings: Option<Ceilings>,
}

impl CaseReport<'_> {
    /// Prints the measurement of a case.
    pub(crate) fn print(&self, case: MicroBatchCase, measured: &Measurement) {
        if self.args.json {
            println!("{}", self.json(case, measured));
        } else {
            self.print_text(case, measured);
        }
    }

    /// Prints the error of a case that could not be measured.
    pub(crate) fn print_error(&self, case: MicroBatchCase, error: &Error) {
        // The lines after the first one are a backtrace.
        let error = format!("{error:#}");
        let error = error.lines().next().unwrap_or_default();
        if self.args.json {
            let mut result = self.case(case);
            result["error"] = error.into();
            println!("{result}");
        } else {
            println!(
                "micro-batch         {} x {} tokens\nerror               {error}\n",
                case.rows, case.positions
            );
        }
    }

    /// Returns the JSON fields of a case that do not depend on the measurement.
    fn case(&self, case: MicroBatchCase) -> Value {
        json!({
            "engine": "loractl",
            "model": self.args.model,
            "device": self.device,
            "dtype": name(self.args.dtype),
            "quantization": name(self.args.quantization),
            "sequence": case.positions,
            "micro_batch": case.rows,
            "activation_checkpointing": name(self.args.activation_checkpointing),
            "threads": self.args.threads,
        })
    }

    fn json(&self, case: MicroBatchCase, measured: &Measurement) -> Value {
        let derived = self.derived(case, measured);
        let mut result = self.case(case);
        let rest = json!({
            "trainable_parameters": measured.trainable_parameters,
            "tokens_per_s": derived.tokens_per_s,
            "step_seconds": measured.seconds,
            "cpu_seconds_per_step": measured.cpu_seconds_per_step,
            "base_bytes_a_parameter": self.base.bytes() as f64 / self.base.config.parameters() as f64,
            "peak_memory_bytes": measured.peak_memory_bytes,
            "peak_reserved_memory_bytes": measured.peak_reserved_memory_bytes,
            "planned_memory": derived.planned,
            "planned_memory_bytes": derived.planned.step_bytes(),
            "flops_per_token": derived.flops_per_token,
            "peak_tflops": derived.peak_tflops,
            "mfu": derived.mfu,
            "load_seconds": self.load_seconds,
            "loss": measured.loss,
        });
        if let (Value::Object(result), Value::Object(rest)) = (&mut result, rest) {
            result.extend(rest);
        }
        if let Some(profile) = self.host_profile {
            result["profile"] = profile.rows(self.args.steps.get());
        }
        if let (Some(profile), Some(ceilings)) = (&measured.gpu_profile, &self.ceilings) {
            profile.add_to(&mut result, ceilings);
        }
        result
    }

    fn print_text(&self, case: MicroBatchCase, measured: &Measurement) {
        let derived = self.derived(case, measured);
        let args = self.args;
        let fastest = measured.seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let slowest = measured.seconds.iter().copied().fold(0.0, f64::max);
        println!("device              {}, {} threads", self.device, args.threads);
        println!(
            "base                {} {}, made in {:.1} s",
            args.model,
            name(args.dtype),
            self.load_seconds
        );
        println!("micro-batch         {} x {} tokens", case.rows, case.positions);
        println!("tokens/s            {:.1} (median of {} steps)", derived.tokens_per_s, args.steps);
        println!("seconds per step    {:.4} ({fastest:.4} to {slowest:.4})", measured.median_seconds());
        println!("CPU s per step      {:.3}", measured.cpu_seconds_per_step);
        println!("GFLOPs per token    {:.3}", derived.flops_per_token / 1e9);
        if let (Some(mfu), Some(peak)) = (derived.mfu, derived.peak_tflops) {
            println!("MFU                 {:.1} % of {peak} TFLOP/s", mfu * 100.0);
        }
        println!("peak memory         {:.3} GB", measured.peak_memory_bytes as f64 / 1e9);
        if let Some(bytes) = measured.peak_reserved_memory_bytes {
            println!("peak reserved       {:.3} GB", bytes as f64 / 1e9);
        }
        println!("planned             {:.3} GB", derived.planned.step_bytes() as f64 / 1e9);
        println!("loss                {:.4}", measured.loss);
        if let Some(profile) = self.host_profile {
            println!("\n{}", profile.table(args.steps.get()));
        }
        if let (Some(profile), Some(ceilings)) = (&measured.gpu_profile, &self.ceilings) {
            println!("\n{}", profile.table(ceilings));
        }
        if args.cases().len() > 1 {
            println!();
        }
    }

    fn derived(&self, case: MicroBatchCase, measured: &Measurement) -> DerivedMetrics {
        let config = &self.base.config;
        let (rows, positions) = (case.rows.get() as usize, case.positions.get() as usize);
        let footprint = ModelFootprint {
            model: config,
            index: None,
            format: self.args.format(),
            device: if self.base.device().is_cpu() { DeviceKind::Cpu } else { DeviceKind::Gpu },
        };
        let planned = footprint.memory(&TrainingWorkload {
            modules: &config.linear_modules(),
            adapter: &AdapterSpec::default(),
            shape: MicroBatchShape { rows, positions, count: 1 },
            checkpointing: self.args.activation_checkpointing.into_spec(),
            optim: Optim::default(),
            keeps_best: false,
        });
        let tokens_per_s = (rows * positions) as f64 / measured.median_seconds();
        let flops_of_row = row_flops(config, measured.trainable_parameters, positions as u64);
        let flops_per_token = flops_of_row as f64 / positions as f64;
        let known_peak = utilization::peak_tflops(&self.device).filter(|_| self.args.dtype == Dtype::Bf16);
        let peak_tflops = self.args.peak_tflops.or(known_peak);
        DerivedMetrics {
            tokens_per_s,
            flops_per_token,
            peak_tflops,
            mfu: peak_tflops.map(|peak| tokens_per_s * flops_per_token / (peak * 1e12)),
            planned,
        }
    }
}

/// Metrics that are derived from the measurement of a case.
struct DerivedMetrics {
    tokens_per_s: f64,
    flops_per_token: f64,
    peak_tflops: Option<f64>,
    mfu: Option<f64>,
    planned: MemoryEstimate,
}
