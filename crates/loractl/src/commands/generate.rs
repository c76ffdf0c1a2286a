//! `loractl generate`: text from a base, with or without an adapter.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lora_data::{Message, Tokenizer};
use lora_model::{Base, Generator, PeftAdapter, Sampling};
use lora_spec::BaseLayout;

use crate::output::line;
use crate::receipt;

/// Continue a prompt with a base model and, if given, an adapter
///
/// Greedy by default; with --temperature, tokens are drawn. --chat puts the prompt into the base's chat template. With an
/// adapter that has its receipt.json, the base is held (and quantized) as the adapter was trained.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  loractl generate --base examples/dates/base --adapter runs/dates --chat --prompt \"the 3rd of March 2021\"
  loractl generate --base base --prompt Once --temperature 0.8 --top-p 0.9 --seed 1")]
pub(crate) struct Args {
    /// Directory of the base model.
    #[arg(long)]
    base: PathBuf,
    /// Directory of a PEFT adapter.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// The text to continue.
    #[arg(long)]
    prompt: String,
    /// Treat the prompt as a user's turn of a chat.
    #[arg(long)]
    chat: bool,
    /// The chat's system prompt.
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// The most tokens that are generated.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Draw tokens from the distribution at this temperature (above 0).
    #[arg(long)]
    temperature: Option<f64>,
    /// Draw from this many likeliest tokens; 0: from all.
    #[arg(long, default_value_t = 0, requires = "temperature")]
    top_k: usize,
    /// Draw from the smallest set of tokens with this probability.
    #[arg(long, default_value_t = 1.0, requires = "temperature")]
    top_p: f64,
    /// Seeds the draws.
    #[arg(long, default_value_t = 0, requires = "temperature")]
    seed: u64,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    let sampling = args.sampling()?;
    let tokenizer = Tokenizer::load(&args.base)?;
    let base = Base::load(&args.base, args.base_layout()?, &lora_train::ComputeDevice::Cpu)?;
    let adapter =
        args.adapter.as_ref().map(|dir| PeftAdapter::read(dir)?.to_adapter(&base.config)).transpose()?;
    let prompt = if args.chat {
        let system = args.system.iter().map(|text| Message::new("system", text.as_str()));
        let messages: Vec<Message> = system.chain([Message::new("user", args.prompt.as_str())]).collect();
        tokenizer.encode(&tokenizer.render_chat(&messages, true)?, false)?
    } else {
        tokenizer.encode(&args.prompt, true)?
    };
    if prompt.is_empty() {
        bail!("--prompt: the text has no token; give at least one character");
    }
    let generator = Generator { base: &base, adapter: adapter.as_ref() };
    let tokens = generator
        .generate(&prompt, tokenizer.stop_tokens(), args.max_new_tokens, sampling)
        .context("cannot generate")?;
    line(&tokenizer.decode(&tokens, true)?)?;
    Ok(ExitCode::SUCCESS)
}

impl Args {
    /// How the adapter's base was held in training.
    fn base_layout(&self) -> Result<BaseLayout> {
        let receipt = self.adapter.as_deref().map(receipt::read).transpose()?.flatten();
        Ok(receipt.map_or_else(BaseLayout::default, |receipt| receipt.job.base_layout()))
    }

    fn sampling(&self) -> Result<Sampling> {
        let Some(temperature) = self.temperature else { return Ok(Sampling::Greedy) };
        if !(temperature.is_finite() && temperature > 0.0) {
            bail!("--temperature: {temperature} is not above 0; leave it out for greedy decoding");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            bail!("--top-p: {} is not in (0, 1]", self.top_p);
        }
        Ok(Sampling::Sample { temperature, top_k: self.top_k, top_p: self.top_p, seed: self.seed })
    }
}
