//! Times training steps at SmolLM2-135M's published shape with random weights: LoRA r = 16 on every linear layer but the
//! head, every position labelled, one micro-batch a step, clipping and AdamW as a training run does them.
//!
//! `benches/peft/train_step.py` is the same step with PEFT + Transformers.

mod base;
mod process;
mod profile;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use lora_model::{Adapter, Base, Batch, Pass};
use lora_ops::adamw::AdamW;
use lora_spec::{ActivationCheckpointing, AdapterSpec, BaseDtype, Philox};
use lora_train::{ComputeDevice, Engine, Peers, Share};
use serde_json::json;

/// Time training steps of the engine on the CPU.
#[derive(Debug, Parser)]
struct Args {
    /// Type of the base
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Threads of the engine
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Positions of a row
    #[arg(long, default_value_t = 256)]
    sequence: usize,
    /// Rows of a micro-batch
    #[arg(long, default_value_t = 2)]
    micro_batch: usize,
    /// Steps that are not measured
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Steps that are measured
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// What the backward pass recomputes instead of keeping it
    #[arg(long, value_enum, default_value_t = Checkpointing::None)]
    activation_checkpointing: Checkpointing,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    /// Print where the time of the measured steps went
    #[arg(long, conflicts_with = "json")]
    profile: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Checkpointing {
    None,
    Block,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.steps == 0 || args.sequence == 0 || args.micro_batch == 0 {
        bail!("--steps, --sequence and --micro-batch must be at least 1");
    }
    let profile = args.profile.then(profile::install).transpose()?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads).build()?;
    pool.install(|| run(&args, profile.as_ref()))
}

fn run(args: &Args, profile: Option<&profile::Profile>) -> Result<()> {
    let dtype = match args.dtype {
        Dtype::F32 => BaseDtype::F32,
        Dtype::Bf16 => BaseDtype::Bf16,
    };
    let started = Instant::now();
    let dir = base::write(dtype).context("writing the random base")?;
    let write_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let mut trainer = Trainer::new(Base::load(dir.path(), BaseDtype::Auto, &ComputeDevice::Cpu)?, args)?;
    let load_seconds = started.elapsed().as_secs_f64();
    drop(dir);

    let mut seconds = Vec::with_capacity(args.steps);
    let mut cpu_before = process::cpu_seconds()?;
    let mut loss = f64::NAN;
    for step in 0..args.warmup + args.steps {
        if step == args.warmup {
            cpu_before = process::cpu_seconds()?;
            profile.inspect(|profile| profile.reset());
        }
        let started = Instant::now();
        loss = tracing::trace_span!("between operations").in_scope(|| trainer.step(step as u64))?;
        if step >= args.warmup {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    let cpu_seconds = (process::cpu_seconds()? - cpu_before) / args.steps as f64;
    let mut sorted = seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let median = (sorted[(args.steps - 1) / 2] + sorted[args.steps / 2]) / 2.0;
    let tokens_per_s = (args.micro_batch * args.sequence) as f64 / median;
    let peak = process::peak_rss_bytes()?;
    if args.json {
        let result = json!({
            "engine": "loractl",
            "dtype": format!("{:?}", args.dtype).to_lowercase(),
            "threads": args.threads,
            "sequence": args.sequence,
            "micro_batch": args.micro_batch,
            "trainable_parameters": trainer.engine.adapter().layout().len,
            "tokens_per_s": tokens_per_s,
            "step_seconds": seconds,
            "cpu_seconds_per_step": cpu_seconds,
            "load_seconds": load_seconds,
            "peak_rss_bytes": peak,
            "loss": loss,
        });
        println!("{result}");
        return Ok(());
    }
    println!(
        "base                {:>10} written in {write_seconds:.1} s, loaded in {load_seconds:.1} s",
        format!("{:?}", args.dtype).to_lowercase()
    );
    println!("threads             {:>10}", args.threads);
    println!("tokens/s            {tokens_per_s:>10.1} (median of {} steps)", args.steps);
    println!("seconds a step      {median:>10.3} ({:.3} to {:.3})", sorted[0], sorted[args.steps - 1]);
    println!("CPU seconds a step  {cpu_seconds:>10.3}");
    println!("peak RSS, GB        {:>10.3}", peak as f64 / 1e9);
    println!("loss                {loss:>10.4}");
    if let Some(profile) = profile {
        println!("\n{}", profile.table(args.steps));
    }
    Ok(())
}

/// An engine alone, and the shape of its only micro-batch.
struct Trainer {
    engine: Engine,
    batch: usize,
    seq: usize,
    checkpointing: ActivationCheckpointing,
}

impl Trainer {
    fn new(base: Base, args: &Args) -> Result<Self> {
        let adapter = Adapter::new(&base.config, &AdapterSpec::default(), 0)?;
        Ok(Self {
            engine: Engine::new(Arc::new(base), adapter)?,
            batch: args.micro_batch,
            seq: args.sequence,
            checkpointing: match args.activation_checkpointing {
                Checkpointing::None => ActivationCheckpointing::None,
                Checkpointing::Block => ActivationCheckpointing::Block,
            },
        })
    }

    /// One optimizer step on fresh random tokens; returns the mean loss a token.
    fn step(&mut self, step: u64) -> Result<f64> {
        let vocab = self.engine.base().config.vocab_size as u64;
        let philox = Philox::new(0, "tokens");
        let tokens: Vec<u32> = (0..(self.batch * self.seq) as u32)
            .map(|i| philox.below(vocab, [step as u32, i, 0, 0]) as u32)
            .collect();
        let mut targets = tokens.clone();
        targets.rotate_left(1);
        let rows: Vec<u64> = (0..self.batch as u64).collect();
        let batch = Batch {
            batch: self.batch,
            seq: self.seq,
            tokens: &tokens,
            targets: &targets,
            weights: &vec![1.0; tokens.len()],
            rows: &rows,
        };
        let pass = Pass { checkpointing: self.checkpointing, dropout: 0.0, seed: 0, step };
        let (mut alone, share) = (Peers::none(), Share { leaves: 1, ranges: &[0..1] });
        self.engine.start(share, 0..1)?;
        self.engine.forward_backward(batch, pass, share, &mut alone)?;
        let (loss, weight) = self.engine.losses()?.into_iter().next().context("no loss")?;
        let norm = self.engine.reduce(&mut alone, share, Some(weight))?.context("no norm")?;
        let adamw = AdamW { lr: 2e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        self.engine.optim_step(adamw, norm, 1.0)?;
        Ok(loss / weight)
    }
}
