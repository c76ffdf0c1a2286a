//! `loractl generate`: generates text with a base and an optional adapter.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lora_data::{Message, Tokenizer};
use lora_model::{Base, Generator, PeftAdapter, Sampling};
use lora_spec::{BaseLayout, SourceDir};

use crate::output::line;
use crate::receipt;

/// Generate text with a base model and an optional adapter
///
/// Decoding is greedy by default; with --temperature, tokens are sampled. With --chat,
/// the prompt is formatted by the chat template of the base. If the adapter has a
/// receipt.json, the base is loaded (and quantized) as it was for training.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl generate --base examples/dates/base --adapter runs/dates --chat --prompt \"the 3rd of March 2021\"
  loractl generate --base base --prompt Once --temperature 0.8 --top-p 0.9 --seed 1"
)]
pub(crate) struct Args {
    /// Directory of the base model.
    #[arg(long)]
    base: PathBuf,
    /// Directory of a PEFT adapter.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Text to continue.
    #[arg(long)]
    prompt: String,
    /// Treat the prompt as the user's message in a chat.
    #[arg(long)]
    chat: bool,
    /// System prompt of the chat.
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// Maximum number of tokens to generate.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Sample tokens at this temperature (above 0).
    #[arg(long)]
    temperature: Option<f64>,
    /// Sample only from this many most likely tokens; 0 means all tokens.
    #[arg(long, default_value_t = 0, requires = "temperature")]
    top_k: usize,
    /// Sample only from the smallest set of most likely tokens with this total probability.
    #[arg(long, default_value_t = 1.0, requires = "temperature")]
    top_p: f64,
    /// Seed for sampling.
    #[arg(long, default_value_t = 0, requires = "temperature")]
    seed: u64,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    let sampling = args.sampling()?;
    let dir = SourceDir::from(&args.base);
    let tokenizer = Tokenizer::load(&dir)?;
    let receipt = args.adapter.as_deref().map(receipt::read).transpose()?.flatten();
    // As in the training of the adapter.
    let layout = receipt.as_ref().map_or_else(BaseLayout::default, |receipt| receipt.job.base_layout());
    let base = Base::load(&dir, layout, &lora_train::ComputeDevice::Cpu)?;
    if let Some(receipt) = receipt.filter(|receipt| receipt.base_sha256 != base.sha256()) {
        bail!(
            "--base: {} is not the base of the adapter's job: its SHA-256 is {}, not {}",
            args.base.display(),
            base.sha256(),
            receipt.base_sha256
        );
    }
    let adapter = args
        .adapter
        .as_ref()
        .map(|dir| PeftAdapter::read(&dir.into())?.to_adapter(&base.config))
        .transpose()?;
    let prompt = if args.chat {
        let system = args.system.iter().map(|text| Message::new("system", text.as_str()));
        let messages: Vec<Message> = system.chain([Message::new("user", args.prompt.as_str())]).collect();
        tokenizer.encode(&tokenizer.render_chat(&messages, true)?, false)?
    } else {
        tokenizer.encode(&args.prompt, true)?
    };
    if prompt.is_empty() {
        bail!("--prompt: the text has no tokens; give at least one character");
    }
    let generator = Generator { base: &base, adapter: adapter.as_ref() };
    let tokens = generator
        .generate(&prompt, tokenizer.stop_tokens(), args.max_new_tokens, sampling)
        .context("cannot generate")?;
    line(&tokenizer.decode(&tokens, true)?)?;
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn sampling(&self) -> Result<Sampling> {
        let Some(temperature) = self.temperature else { return Ok(Sampling::Greedy) };
        if !(temperature.is_finite() && temperature > 0.0) {
            bail!("--temperature: {temperature} is not above 0; omit the flag for greedy decoding");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            bail!("--top-p: {} is not in (0, 1]", self.top_p);
        }
        Ok(Sampling::Sample { temperature, top_k: self.top_k, top_p: self.top_p, seed: self.seed })
    }
}
