//! `loractl verify`: checks a result against its receipt.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use lora_train::InputPaths;

use crate::output::{Format, Table};

/// Check a result against its receipt
///
/// First the hashes of the result's files, of the base and of the data are compared.
/// Then the first steps are trained again, and losses, gradient norms and the trained
/// state are compared bit by bit.
///
/// Base and data are read from the paths that the job used, unless flags name other
/// paths. A job that was submitted to a coordinator may have used paths of another
/// machine.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl verify runs/dates
  loractl verify dates --base ~/models/base --train train.jsonl --eval eval.jsonl"
)]
pub(crate) struct Args {
    /// Directory of the result.
    dir: PathBuf,
    /// Number of steps to train again.
    #[arg(long, value_name = "N", default_value_t = 3)]
    steps: u64,
    /// Directory of the base, if it is not where the job read it.
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// File of training rows, if it is not where the job read it; given once for each file, in the
    /// order of the job.
    #[arg(long, value_name = "FILE")]
    train: Vec<PathBuf>,
    /// File of evaluation rows, if it is not where the job read it.
    #[arg(long, value_name = "FILE")]
    eval: Option<PathBuf>,
    /// Directory of the adapter that the job started from (adapter.init_from), if it is not where
    /// the job read it.
    #[arg(long, value_name = "DIR")]
    init_from: Option<PathBuf>,
    /// Output format.
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
