//! Times training steps at the shapes of published models with random weights: LoRA r = 16 on every linear layer but the head,
//! every position labelled, one micro-batch a step, clipping and AdamW as a training run does them.
//!
//! `benches/peft_step.py` is the same step with PEFT + Transformers; `benches/compare.sh` runs both.

mod process;
mod profile;
mod shape;
mod utilization;

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use lora_model::{Adapter, Base, Batch, Pass};
use lora_ops::adamw::AdamW;
use lora_spec::{
    ActivationCheckpointing, AdapterSpec, BaseDtype, BaseFormat, Device, Held, MicroBatchShape, Optim,
    Philox, Quantization, Training, row_flops,
};
use lora_train::{Engine, Peers, Share};
use serde_json::json;

/// Time training steps of the engine.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// smollm2-135m, llama-3.2-1b, llama-3.1-8b, qwen2.5-7b, or the path of a config.json
    #[arg(long, default_value = "smollm2-135m")]
    model: String,
    /// Where to compute: cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Type of the base
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// What the blocks' linear weights are quantized to
    #[arg(long, value_enum, default_value_t = Quantized::None)]
    quantization: Quantized,
    /// Positions of a row
    #[arg(long, default_value = "256")]
    sequence: NonZeroU32,
    /// Rows of a micro-batch
    #[arg(long, default_value = "2")]
    micro_batch: NonZeroU32,
    /// What the backward pass recomputes instead of keeping it
    #[arg(long, value_enum, default_value_t = Checkpointing::None)]
    activation_checkpointing: Checkpointing,
    /// Threads of the engine
    #[arg(long, default_value = "2")]
    threads: NonZeroUsize,
    /// Steps that are not measured
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Steps that are measured
    #[arg(long, default_value = "8")]
    steps: NonZeroUsize,
    /// The device's peak in TFLOP/s; default: what its maker says of dense bf16, for the GPUs that are known here
    #[arg(long)]
    peak_tflops: Option<f64>,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    /// Print where the host's time in the measured steps went
    #[arg(long, conflicts_with = "json")]
    profile: bool,
}

/// An option's value, as it is given.
fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Quantized {
    None,
    Nf4,
    /// NF4 with double quantization
    Nf4Double,
    Int8,
}

impl Quantized {
    fn of(self) -> Quantization {
        match self {
            Self::None => Quantization::None,
            Self::Nf4 => Quantization::Nf4 { double_quant: false },
            Self::Nf4Double => Quantization::Nf4 { double_quant: true },
            Self::Int8 => Quantization::Int8,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Checkpointing {
    None,
    Block,
    BlockSaveAttention,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let profile = args.profile.then(profile::install).transpose()?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads.get()).build()?;
    pool.install(|| run(&args, profile.as_ref()))
}

fn run(args: &Args, profile: Option<&profile::Profile>) -> Result<()> {
    let config = shape::shape(&args.model)?;
    let device = lora_train::open_device(args.device)?;
    let described = lora_ops::device::describe(&device)?;
    let dtype = match args.dtype {
        Dtype::F32 => BaseDtype::F32,
        Dtype::Bf16 => BaseDtype::Bf16,
    };
    let started = Instant::now();
    let format = BaseFormat { dtype, quantization: args.quantization.of() };
    let base = Base::random(config.clone(), format, 0, &device).context("making the random base")?;
    device.synchronize()?;
    let load_seconds = started.elapsed().as_secs_f64();
    let bytes_a_parameter = base.bytes() as f64 / config.parameters() as f64;
    let mut trainer = Trainer::new(base, args)?;
    let shape = MicroBatchShape {
        rows: args.micro_batch.get() as usize,
        positions: args.sequence.get() as usize,
        count: 1,
    };
    let held = Held { model: &config, checkpoint: None, format, gpu: !device.is_cpu() };
    let modules = config.linear_modules();
    let planned = held.memory(&Training {
        modules: &modules,
        adapter: &AdapterSpec::default(),
        shape,
        checkpointing: trainer.checkpointing,
        optim: Optim::default(),
        keeps_best: false,
    });

    let mut seconds = Vec::with_capacity(args.steps.get());
    let mut cpu_before = process::cpu_seconds()?;
    let mut loss = f64::NAN;
    for step in 0..args.warmup + args.steps.get() {
        if step == args.warmup {
            cpu_before = process::cpu_seconds()?;
            profile.inspect(|profile| profile.reset());
        }
        let tokens = trainer.tokens(step);
        let started = Instant::now();
        loss = tracing::trace_span!("between operations").in_scope(|| trainer.step(&tokens, step))?;
        device.synchronize()?;
        if step >= args.warmup {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    let cpu_seconds = (process::cpu_seconds()? - cpu_before) / args.steps.get() as f64;

    let mut sorted = seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len() - 1;
    let median = (sorted[last / 2] + sorted[last.div_ceil(2)]) / 2.0;
    let (rows, sequence) = (u64::from(args.micro_batch.get()), u64::from(args.sequence.get()));
    let tokens_per_s = (rows * sequence) as f64 / median;
    let trainable = trainer.engine.adapter().layout().len as u64;
    let flops_per_token = row_flops(&config, trainable, sequence) as f64 / sequence as f64;
    let known_peak = utilization::peak_tflops(&described).filter(|_| args.dtype == Dtype::Bf16);
    let peak_tflops = args.peak_tflops.or(known_peak);
    let mfu = peak_tflops.map(|peak| tokens_per_s * flops_per_token / (peak * 1e12));
    let peak_memory = match lora_train::device_memory(&device)? {
        Some(memory) => memory.peak_bytes,
        None => process::peak_rss_bytes()?,
    };
    if args.json {
        let result = json!({
            "engine": "loractl",
            "model": args.model,
            "device": described,
            "dtype": name(args.dtype),
            "quantization": name(args.quantization),
            "sequence": sequence,
            "micro_batch": rows,
            "activation_checkpointing": name(args.activation_checkpointing),
            "threads": args.threads,
            "trainable_parameters": trainable,
            "tokens_per_s": tokens_per_s,
            "step_seconds": seconds,
            "cpu_seconds_per_step": cpu_seconds,
            "base_bytes_a_parameter": bytes_a_parameter,
            "peak_memory_bytes": peak_memory,
            "planned_memory": planned,
            "planned_memory_bytes": planned.of_a_step(),
            "flops_per_token": flops_per_token,
            "peak_tflops": peak_tflops,
            "mfu": mfu,
            "load_seconds": load_seconds,
            "loss": loss,
        });
        println!("{result}");
        return Ok(());
    }
    println!("device              {described}, {} threads", args.threads);
    println!("base                {} {}, made in {load_seconds:.1} s", args.model, name(args.dtype));
    println!("micro-batch         {rows} x {sequence} tokens");
    println!("tokens/s            {tokens_per_s:.1} (median of {} steps)", args.steps);
    println!("seconds a step      {median:.4} ({:.4} to {:.4})", sorted[0], sorted[last]);
    println!("CPU seconds a step  {cpu_seconds:.3}");
    println!("GFLOPs a token      {:.3}", flops_per_token / 1e9);
    if let (Some(mfu), Some(peak)) = (mfu, peak_tflops) {
        println!("MFU                 {:.1} % of {peak} TFLOP/s", mfu * 100.0);
    }
    println!("peak memory         {:.3} GB", peak_memory as f64 / 1e9);
    println!("planned             {:.3} GB", planned.of_a_step() as f64 / 1e9);
    println!("loss                {loss:.4}");
    if let Some(profile) = profile {
        println!("\n{}", profile.table(args.steps.get()));
    }
    Ok(())
}

/// An engine alone, and the shape of its only micro-batch.
struct Trainer {
    engine: Engine,
    rows: Vec<u64>,
    seq: usize,
    checkpointing: ActivationCheckpointing,
}

impl Trainer {
    fn new(base: Base, args: &Args) -> Result<Self> {
        let adapter = Adapter::new(&base.config, &AdapterSpec::default(), 0)?;
        Ok(Self {
            engine: Engine::new(Arc::new(base), adapter, Optim::default())?,
            rows: (0..args.micro_batch.get().into()).collect(),
            seq: args.sequence.get() as usize,
            checkpointing: match args.activation_checkpointing {
                Checkpointing::None => ActivationCheckpointing::None,
                Checkpointing::Block => ActivationCheckpointing::Block,
                Checkpointing::BlockSaveAttention => ActivationCheckpointing::BlockSaveAttention,
            },
        })
    }

    /// Random tokens of a step's micro-batch.
    fn tokens(&self, step: usize) -> Vec<u32> {
        let vocab = self.engine.base().config.vocab_size as u64;
        let philox = Philox::new(0, "tokens");
        let count = (self.rows.len() * self.seq) as u32;
        (0..count).map(|i| philox.below(vocab, [step as u32, i, 0, 0]) as u32).collect()
    }

    /// One optimizer step; returns the mean loss a token.
    fn step(&mut self, tokens: &[u32], step: usize) -> Result<f64> {
        let mut targets = tokens.to_vec();
        targets.rotate_left(1);
        let batch = Batch {
            batch: self.rows.len(),
            seq: self.seq,
            tokens,
            targets: &targets,
            weights: &vec![1.0; tokens.len()],
            rows: &self.rows,
        };
        let pass = Pass { checkpointing: self.checkpointing, dropout: 0.0, seed: 0, step: step as u64 };
        let only = 0..1;
        let (mut alone, share) = (Peers::none(), Share { leaves: 1, ranges: std::slice::from_ref(&only) });
        self.engine.start(share, only.clone())?;
        self.engine.forward_backward(batch, pass, share, &mut alone)?;
        let (loss, weight) = self.engine.losses()?.into_iter().next().context("no loss")?;
        let norm = self.engine.reduce(&mut alone, share, Some(weight))?.context("no norm")?;
        let adamw = AdamW { lr: 2e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        self.engine.optim_step(adamw, norm, 1.0)?;
        Ok(loss / weight)
    }
}
