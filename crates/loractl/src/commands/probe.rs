//! `loractl probe`: loads a CUDA library in a separate process for `loractl doctor`.

use std::process::ExitCode;

use anyhow::Result;

use crate::cuda::ProbeQuery;
use crate::output::line;

/// Load a CUDA library and print what it reports, as JSON
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  loractl probe libcuda.so.1")]
pub(crate) struct Args {
    /// File name of the library.
    #[arg(value_parser = parse_query)]
    question: ProbeQuery,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    line(&args.question.answer()?)?;
    Ok(ExitCode::SUCCESS)
}

fn parse_query(file: &str) -> Result<ProbeQuery, String> {
    ProbeQuery::named(file).ok_or_else(|| "is not a library that doctor examines".into())
}
