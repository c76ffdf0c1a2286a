//! `loractl quickstart`: trains the example and compares answers before and after.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lora_collective::backend_choice::Collective;
use lora_data::{Message, Tokenizer};
use lora_model::{Adapter, Base, Generator, PeftAdapter, Sampling};
use lora_spec::{JobFile, JobFiles, JobState};
use rayon::prelude::*;
use serde::Deserialize;

use crate::local::{DeviceChoice, RunOptions, run_job};
use crate::output::{Table, bytes, count, line};

/// Maximum length of an answer, in tokens.
const MAX_NEW_TOKENS: usize = 48;

/// Train the example and compare answers before and after
///
/// Held-out rows are answered with the base model, and again with the trained adapter.
/// The output has the share of exact answers, sizes and times.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl quickstart
  loractl quickstart --workers 4 --out runs/quickstart-on-four"
)]
pub(crate) struct Args {
    /// Directory of the example.
    #[arg(long, value_name = "DIR", default_value = "examples/dates")]
    example: PathBuf,
    /// Output directory [default: runs/quickstart, or the first runs/quickstart-N that does not
    /// exist]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Number of worker processes.
    #[arg(long, value_name = "N", default_value_t = 2)]
    workers: usize,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    let path = args.example.join("job.yaml");
    if !path.is_file() {
        bail!("{} does not exist; run this in the root of the repository, or give --example", path.display());
    }
    let job = JobFile::read(&path)?.job;
    let held_out =
        job.data.eval.as_ref().with_context(|| {
            format!("{}: data.eval is missing; name a file of held-out rows", path.display())
        })?;
    let files = JobFiles::from_job(&job);
    let base = Base::load(&files.base, job.base_layout(), &lora_train::ComputeDevice::Cpu)?;
    let tokenizer = Tokenizer::load(&files.base)?;
    let rows = read_rows(held_out)?;

    eprintln!("answering {} held-out rows with the base model", rows.len());
    let before = exact_match(&base, None, &tokenizer, &rows)?;
    let out = args.out.unwrap_or_else(free_directory);
    let options = RunOptions {
        job: path,
        workers: Some(args.workers),
        // The example must run on every machine.
        device: DeviceChoice::Cpu,
        collective: Collective::Auto,
        worker: None,
        output_dir: out.clone(),
        threads: None,
        resume: false,
    };
    let summary = run_job(&options)?;
    if summary.state != JobState::Succeeded {
        bail!("the job ended in the state {}: {}", summary.state.name(), summary.failure.unwrap_or_default());
    }
    eprintln!("answering the same rows with the adapter");
    let adapter = PeftAdapter::read(&out.as_path().into())?.to_adapter(&base.config)?;
    let after = exact_match(&base, Some(&adapter), &tokenizer, &rows)?;

    let mut table = Table::new();
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    table.row("exact match before", percent(before));
    table.row("exact match after", percent(after));
    table.row("held-out rows", rows.len());
    let share = 100.0 * summary.trainable_parameters as f64 / summary.total_parameters.max(1) as f64;
    table.row("trainable parameters", format!("{} ({share:.2} %)", count(summary.trainable_parameters)));
    table.row("total parameters", count(summary.total_parameters));
    table.row("adapter size", summary.adapter_bytes.map_or("unknown".into(), bytes));
    let reduced = summary.all_reduced_bytes.map_or("unknown".into(), bytes);
    table.row("all-reduced a step", format!("{reduced} by each of {} workers", summary.workers));
    table.row("training time", format!("{:.0} s", summary.seconds));
    table.row("adapter", out.display());
    line(&table.to_string())?;
    Ok(ExitCode::SUCCESS)
}

/// A held-out conversation; the last message is the expected answer.
#[derive(Debug, Deserialize)]
struct HeldOut {
    messages: Vec<Message>,
}

fn read_rows(path: &Path) -> Result<Vec<HeldOut>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), i + 1)))
        .collect()
}

/// Share of the rows whose greedy answer equals the expected one, except for surrounding
/// whitespace.
fn exact_match(
    base: &Base,
    adapter: Option<&Adapter>,
    tokenizer: &Tokenizer,
    rows: &[HeldOut],
) -> Result<f64> {
    let generator = Generator { base, adapter };
    let is_exact = |row: &HeldOut| -> Result<bool> {
        let Some((answer, question)) = row.messages.split_last() else { return Ok(false) };
        let prompt = tokenizer.encode(&tokenizer.render_chat(question, true)?, false)?;
        let tokens =
            generator.generate(&prompt, tokenizer.stop_tokens(), MAX_NEW_TOKENS, Sampling::Greedy)?;
        Ok(tokenizer.decode(&tokens, true)?.trim() == answer.content().trim())
    };
    let exact = rows.par_iter().map(is_exact).collect::<Result<Vec<bool>>>()?;
    Ok(exact.iter().filter(|exact| **exact).count() as f64 / rows.len().max(1) as f64)
}

/// `runs/quickstart`, or the first `runs/quickstart-N` that does not exist.
fn free_directory() -> PathBuf {
    let first = PathBuf::from("runs/quickstart");
    let others = (2..).map(|n| PathBuf::from(format!("runs/quickstart-{n}")));
    std::iter::once(first).chain(others).find(|dir| !dir.exists()).unwrap_or_default()
}
