//! `loractl probe`: a question that doctor asks in a process of its own.

use std::process::ExitCode;

use anyhow::Result;

use crate::cuda::ProbeQuery;
use crate::output::line;

/// Load a library of CUDA and tell what it says, as JSON.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  loractl probe libcuda.so.1")]
pub(crate) struct Args {
    /// The library's file.
    #[arg(value_parser = parse_query)]
    question: ProbeQuery,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    line(&args.question.answer()?)?;
    Ok(ExitCode::SUCCESS)
}

fn parse_query(file: &str) -> Result<ProbeQuery, String> {
    ProbeQuery::named(file).ok_or_else(|| "is no library that doctor asks for".into())
}
