//! `loractl verify`: a result against its receipt.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use crate::output::{Format, Table};

/// Check a result against its receipt: the hashes of its files, of the base and of the data; then train the first steps
/// again and compare losses, gradient norms and the trained state, bit by bit
///
/// Example: loractl verify out/dates
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory of the result.
    dir: PathBuf,
    /// How many of the first steps are computed again.
    #[arg(long, default_value_t = 3)]
    steps: u64,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    let verification = lora_train::verify(&args.dir, args.steps)?;
    match args.output {
        Format::Json => println!("{}", serde_json::to_string_pretty(&verification)?),
        Format::Table => {
            let mut table = Table::new();
            table.row("files unchanged", verification.files);
            let (replayed, steps) = (verification.replayed_steps, verification.steps);
            table.row("steps replayed", format!("{replayed} of {steps}, same bits"));
            table.row("adapter SHA-256", &verification.adapter_sha256);
            println!("{table}");
        }
    }
    Ok(ExitCode::SUCCESS)
}
