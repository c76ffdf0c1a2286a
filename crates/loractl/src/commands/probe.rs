//! `loractl probe`: loads a CUDA library, in the separate process that `loractl doctor` starts.

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
    #[arg(value_name = "LIBRARY", value_parser = parse_query)]
    query: ProbeQuery,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    line(&args.query.answer()?)?;
    Ok(ExitCode::SUCCESS)
}

fn parse_query(file: &str) -> Result<ProbeQuery, String> {
    ProbeQuery::named(file).ok_or_else(|| "is not a library that doctor examines".into())
}
