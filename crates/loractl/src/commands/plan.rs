//! `loractl plan`: shows what a job would do, without starting anything.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use lora_data::DataReport;
use lora_model::ModelError;
use lora_plan::{MemoryEstimate, Plan, PlanData, PlanFile, PlanRow};
use lora_spec::{
    BaseDtype, BaseFormat, DeviceKind, DeviceMemory, JobFile, JobSpec, ModelConfig, Quantization,
    SafetensorsIndex, SourceDir, StoredWeight,
};
use lora_train::{TrainError, throughput_memory, training_throughput};
use lora_worker::machine_memory;
use serde::Serialize;

use crate::job_check;
use crate::output::{Format, Table, bytes, count, duration, parse_bytes};

/// Show what a job would train, and the memory and time that it would take
///
/// The plan has parameters, rows, tokens, steps, memory and communication. Weights are
/// not read. Problems that would make the job fail are listed on stderr, and the exit
/// code is then 1.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl plan examples/dates/job.yaml
  loractl plan job.yaml --gpu-memory 24GiB --tflops 150
  loractl plan job.yaml --measure
  loractl plan job.yaml --show-rows 5
  loractl plan job.yaml -o json | jq .total_steps"
)]
pub(crate) struct Args {
    /// Job file.
    job: PathBuf,
    /// Memory of a worker's GPU, such as 24GiB; if the job does not fit, settings that would fit
    /// are listed.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    gpu_memory: Option<u64>,
    /// Memory of a worker on a CPU, checked in the same way.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    cpu_memory: Option<u64>,
    /// Estimate the duration of the job from the TFLOP/s of all workers together.
    #[arg(long, value_name = "RATE")]
    tflops: Option<f64>,
    /// Estimate the duration on one worker like this machine's CPU, by timing two blocks of the
    /// model with random weights.
    #[arg(long, conflicts_with = "tflops")]
    measure: bool,
    /// Show this many of the first training rows, with their special tokens; trained tokens are
    /// green on a terminal, and between ⟦ and ⟧ elsewhere.
    #[arg(long, value_name = "N", default_value_t = 1)]
    show_rows: usize,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    let file = JobFile::read(&args.job)?;
    if let Some(rate) = args.tflops.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
        bail!("--tflops: {rate} is not above 0");
    }
    let mut plan = job_check::plan(&file, args.show_rows)?;
    let gpu = args.gpu_memory.map(|bytes| DeviceMemory { kind: DeviceKind::Gpu, bytes });
    let cpu = args.cpu_memory.map(|bytes| DeviceMemory { kind: DeviceKind::Cpu, bytes });
    for memory in gpu.into_iter().chain(cpu) {
        if let Err(too_large) = plan.requirements.fits(memory) {
            plan.problems.push(too_large.to_string());
        }
    }
    if plan.train.report.rows_kept > 0
        && let Err(error) = plan.check_workers(file.job.workers.max)
    {
        plan.problems.push(file.locate(error).to_string());
    }
    let all_reduce = AllReduceEstimate::from_plan(&plan, file.job.workers.max);
    let rate = match args.tflops {
        Some(tflops) => Some(ThroughputEstimate::given(&plan, tflops)),
        None if args.measure && plan.shape.rows > 0 => Some(ThroughputEstimate::measured(&plan, &file.job)?),
        None => None,
    };
    let output = PlanOutput { plan: &plan, all_reduce, rate };
    args.output.print(&output, || text(&output))?;
    for problem in &plan.problems {
        eprintln!("error: {problem}");
    }
    Ok(if plan.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A plan with the estimates that only this command makes.
#[derive(Serialize)]
struct PlanOutput<'a> {
    #[serde(flatten)]
    plan: &'a Plan,
    all_reduce: Option<AllReduceEstimate>,
    rate: Option<ThroughputEstimate>,
}

/// The speed at which the job is computed, and its duration.
#[derive(Serialize)]
#[serde(untagged)]
enum ThroughputEstimate {
    /// The given rate of all workers together.
    Given { tflops: f64, seconds: f64 },
    /// The measured rate of this machine's CPU as the only worker. Operations on padding do not
    /// count.
    Measured { measured_tflops: f64, seconds: f64 },
    /// The reason why there is no measurement.
    None { not_measured: String },
}

impl ThroughputEstimate {
    fn given(plan: &Plan, tflops: f64) -> Self {
        Self::Given { tflops, seconds: plan.flops / (tflops * 1e12) }
    }

    fn measured(plan: &Plan, job: &JobSpec) -> Result<Self> {
        match Self::measure(plan, job) {
            // The measured blocks are the first ones, which may lack modules that the job names one
            // by one.
            Err(TrainError::Field(error)) => {
                Ok(Self::None { not_measured: format!("with only the first blocks, {error}") })
            }
            other => Ok(other?),
        }
    }

    fn measure(plan: &Plan, job: &JobSpec) -> Result<Self, TrainError> {
        let base = SourceDir::from(&job.model.base);
        let config = ModelConfig::read(&base).map_err(ModelError::from)?;
        let format = memory_format(job, &config, &SafetensorsIndex::open(&base).map_err(ModelError::from)?);
        let needed = throughput_memory(job, &config, format, plan.shape)?;
        if let Some(available) = machine_memory().filter(|available| *available < needed) {
            let (needed, available) = (bytes(needed), bytes(available));
            let not_measured =
                format!("two blocks take {needed} of memory, more than this machine's {available}");
            return Ok(Self::None { not_measured });
        }
        let rate = training_throughput(job, &config, format, plan.shape)? * (1.0 - plan.padding);
        Ok(Self::Measured { measured_tflops: rate / 1e12, seconds: plan.flops / rate })
    }

    fn text(&self) -> String {
        match self {
            Self::Given { tflops, seconds } => format!("{} at {tflops} TFLOP/s", duration(*seconds)),
            Self::Measured { measured_tflops, seconds } => {
                let seconds = duration(*seconds);
                format!("{seconds} on one such worker, at {measured_tflops:.3} TFLOP/s measured here")
            }
            Self::None { not_measured } => format!("not measured: {not_measured}"),
        }
    }
}

/// The format in which the base will be loaded: the job's, with `auto` and the quantization of
/// stored weights resolved from the checkpoint.
fn memory_format(job: &JobSpec, config: &ModelConfig, index: &SafetensorsIndex) -> BaseFormat {
    let mut format = job.model.format();
    let embedding = index.tensors.get("model.embed_tokens.weight");
    if format.dtype == BaseDtype::Auto && embedding.is_some_and(|entry| entry.dtype == "BF16") {
        format.dtype = BaseDtype::Bf16;
    }
    match config.linear_modules().first().map(|module| index.weight(module)) {
        Some(Ok(StoredWeight::FourBit(state))) => {
            format.quantization = Quantization::Nf4 { double_quant: state.nested.is_some() };
        }
        Some(Ok(StoredWeight::Int8)) => format.quantization = Quantization::Int8,
        _ => {}
    }
    format
}

/// The all-reduce of a step's gradients among the largest number of workers that the job may have.
#[derive(Serialize)]
struct AllReduceEstimate {
    workers: usize,
    /// Largest number of bytes that any worker sends, and receives, in a step.
    bytes: u64,
    seconds: Seconds,
}

/// Seconds to send the bytes over links of these rates.
#[derive(Serialize)]
struct Seconds {
    at_10_gbps: f64,
    at_25_gbps: f64,
    at_100_gbps: f64,
    /// NVLink 4 with 450 GB/s in each direction.
    over_nvlink: f64,
}

impl AllReduceEstimate {
    /// `None` if one worker computes the whole step.
    fn from_plan(plan: &Plan, workers: usize) -> Option<Self> {
        let workers = workers.min(plan.micro_batches);
        if workers < 2 {
            return None;
        }
        let bytes = plan.all_reduce_bytes(workers);
        let seconds = Seconds {
            at_10_gbps: bytes as f64 / (10e9 / 8.0),
            at_25_gbps: bytes as f64 / (25e9 / 8.0),
            at_100_gbps: bytes as f64 / (100e9 / 8.0),
            over_nvlink: bytes as f64 / 450e9,
        };
        Some(Self { workers, bytes, seconds })
    }
}

fn text(output: &PlanOutput) -> String {
    let plan = output.plan;
    let mut table = Table::new();
    let total = plan.base_parameters + plan.trainable_parameters;
    let share = 100.0 * plan.trainable_parameters as f64 / total.max(1) as f64;
    let modules: Vec<String> = plan.modules.iter().map(|(name, n)| format!("{name} x{n}")).collect();
    table.row("job", &plan.name);
    table.row("base", format!("{} ({} parameters)", plan.base.display(), count(plan.base_parameters)));
    table.row("trained parameters", format!("{} ({share:.2} %)", count(plan.trainable_parameters)));
    table.row("adapted modules", modules.join(", "));
    table.row("adapter size", bytes(plan.adapter_bytes));
    data(&mut table, "training rows", &plan.train);
    if let Some(eval) = &plan.eval {
        data(&mut table, "evaluation rows", eval);
    }
    if let Some(source) = &plan.chat_template {
        table.row("chat template", source);
    }
    let steps = format!(
        "{} ({} an epoch, {} of warm-up)",
        count(plan.total_steps),
        count(plan.steps_per_epoch),
        count(plan.warmup_steps)
    );
    table.row("steps", steps);
    table.row("micro-batches a step", format!("{} (the most workers that can share it)", plan.micro_batches));
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let tokens = format!(
        "{} ({} of the positions computed are padding; {} unpacked, {} packed)",
        count(plan.tokens),
        percent(plan.padding),
        percent(plan.padding_unpacked),
        percent(plan.padding_packed)
    );
    table.row("tokens", tokens);
    let time = output.rate.as_ref().map(|rate| format!(", {}", rate.text()));
    table.row("computation", format!("{} TFLOP{}", tera(plan.flops), time.unwrap_or_default()));
    table.row(
        "memory of a worker",
        format!("{} on a CPU, {} on a GPU", bytes(plan.memory.cpu.peak), bytes(plan.memory.gpu.peak)),
    );
    let parts = |part: fn(&MemoryEstimate) -> u64| {
        format!("{}, {}", bytes(part(&plan.memory.cpu)), bytes(part(&plan.memory.gpu)))
    };
    table.row("  base", parts(|memory| memory.base));
    table.row("  adapter, moments", parts(|memory| memory.adapter + memory.moments));
    table.row("  gradients", parts(|memory| memory.gradients));
    table.row("  activations", parts(|memory| memory.activations));
    if let Some(AllReduceEstimate { workers, bytes: sent, seconds }) = &output.all_reduce {
        let Seconds { at_10_gbps, at_25_gbps, at_100_gbps, over_nvlink } = seconds;
        table.row("all-reduced a step", format!("{} sent by each of {workers} workers", bytes(*sent)));
        let ms = |seconds: &f64| format!("{:.3} ms", 1e3 * seconds);
        let rates = [at_10_gbps, at_25_gbps, at_100_gbps].map(ms).join(", ");
        table.row("  at 10, 25, 100 Gb/s", format!("{rates}; over NVLink {}", ms(over_nvlink)));
    }
    for note in &plan.notes {
        table.row("note", note);
    }
    let is_terminal = std::io::stdout().is_terminal();
    let rows = plan.rows.iter().enumerate().map(|(i, row)| row_text(i + 1, row, is_terminal));
    format!("{table}{}", rows.collect::<String>())
}

/// Returns a row with its trained tokens in green, or between ⟦ and ⟧.
fn row_text(number: usize, row: &PlanRow, is_terminal: bool) -> String {
    let PlanRow { tokens, trained_tokens, text } = row;
    let (text, marks) = if is_terminal {
        (text.replace('⟦', "\u{1b}[32m").replace('⟧', "\u{1b}[0m"), "green")
    } else {
        (text.clone(), "between ⟦ and ⟧")
    };
    format!("\n\ntraining row {number}: {tokens} tokens, {trained_tokens} trained ({marks}):\n{text}")
}

/// Formats `flops` in units of 10^12: with two decimals below 100, as a whole number from 100 on.
fn tera(flops: f64) -> String {
    let tera = flops / 1e12;
    if tera >= 100.0 { count(tera as u64) } else { format!("{tera:.2}") }
}

fn data(table: &mut Table, name: &str, data: &PlanData) {
    let DataReport {
        rows_read, rows_kept, dropped, without_targets, truncated, tokens, trained_tokens, ..
    } = data.report;
    let (kept, read) = (count(rows_kept as u64), count(rows_read as u64));
    // With data.split_turns a row has several samples.
    let counts = match rows_kept > rows_read {
        true => format!("{kept} samples of {read} rows"),
        false => format!("{kept} of {read}"),
    };
    match data.files.as_slice() {
        [PlanFile { path, weight, .. }] if *weight == 1.0 => {
            table.row(name, format!("{counts} in {}", path.display()));
        }
        files => {
            let unit = if files.len() == 1 { "file" } else { "files" };
            table.row(name, format!("{counts} in {} {unit}", files.len()));
            for PlanFile { path, rows_kept, weight, epoch_rows } in files {
                let (rows, of_epoch) = (count(*rows_kept as u64), count(*epoch_rows as u64));
                let rows = format!("{rows} rows, {weight} times an epoch: {of_epoch}");
                table.row(format!("  {}", path.display()), rows);
            }
        }
    }
    for (what, rows) in [("too long", dropped), ("truncated", truncated), ("without target", without_targets)]
    {
        if rows > 0 {
            table.row(format!("  {what}"), count(rows as u64));
        }
    }
    let lengths = format!(
        "{} to {} tokens, median {}, 95 % up to {}",
        data.report.shortest, data.report.longest, data.report.median, data.report.percentile_95
    );
    table.row("  lengths", lengths);
    table.row("  tokens", format!("{}, {} of them trained", count(tokens), count(trained_tokens)));
}
