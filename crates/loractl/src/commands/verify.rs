//! `loractl verify`: a result against its receipt.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use lora_train::InputPaths;

use crate::output::{Format, Table};

/// Check a result against its receipt: the hashes of its files, of the base and of the data; then train the first steps
/// again and compare losses, gradient norms and the trained state, bit by bit
///
/// Base and data are looked for where the job had them, which for a job that was submitted may be another machine.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  loractl verify runs/dates
  loractl verify dates --base ~/models/base --train train.jsonl --eval eval.jsonl")]
pub(crate) struct Args {
    /// Directory of the result.
    dir: PathBuf,
    /// How many of the first steps are computed again.
    #[arg(long, value_name = "N", default_value_t = 3)]
    steps: u64,
    /// Directory of the base, if it is elsewhere now.
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// The training rows, if they are elsewhere now.
    #[arg(long, value_name = "FILE")]
    train: Option<PathBuf>,
    /// The evaluation rows, if they are elsewhere now.
    #[arg(long, value_name = "FILE")]
    eval: Option<PathBuf>,
    /// Directory of the adapter that the job started from, if it is elsewhere now.
    #[arg(long, value_name = "DIR")]
    init_from: Option<PathBuf>,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    let Args { dir, steps, base, train, eval, init_from, output } = args;
    let verification = lora_train::verify(&dir, &InputPaths { base, train, eval, init_from }, steps)?;
    output.print(&verification, || {
        let mut table = Table::new();
        table.row("files unchanged", verification.files);
        let (replayed, steps) = (verification.replayed_steps, verification.steps);
        table.row("steps replayed", format!("{replayed} of {steps}, same bits"));
        table.row("adapter SHA-256", &verification.adapter_sha256);
        table.to_string()
    })?;
    Ok(ExitCode::SUCCESS)
}
