//! `loractl doctor`: shows what this machine can train on.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cuda::ANSWER_LIMIT;
use crate::doctor::{Options, examine};
use crate::local::DeviceChoice;
use crate::output::Format;

/// Show what this machine can train on, and what it lacks for GPUs
///
/// The driver and CUDA's libraries are loaded, each in its own process, and their
/// versions and paths are shown. If there is a lora-worker that was built for CUDA, it
/// measures every GPU, and an all-reduce among several GPUs. Each problem is listed
/// with its remedy.
///
/// With --device cuda, the exit code is 1 if CUDA does not work.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl doctor
  loractl doctor --device cuda
  loractl doctor --worker target/release/lora-worker -o json | jq .cuda.problems"
)]
pub(crate) struct Args {
    /// Device to examine; auto looks for GPUs and does not require them.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Path of the lora-worker for GPUs [default: beside loractl, then on PATH]
    #[arg(long, value_name = "PATH")]
    worker: Option<PathBuf>,
    /// Time limit in seconds for each process, and for the all-reduce.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = ANSWER_LIMIT.as_secs() as u32,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    timeout: u32,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    let Args { device, worker, timeout, output } = args;
    let limit = Duration::from_secs(timeout.into());
    let options = Options { cuda: device != DeviceChoice::Cpu, worker, limit };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let report = runtime.block_on(examine(&options))?;
    output.print(&report, || report.text())?;
    let works = report.cuda.is_some_and(|cuda| cuda.works);
    Ok(if device == DeviceChoice::Cuda && !works { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
