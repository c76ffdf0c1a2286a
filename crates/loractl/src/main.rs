//! `loractl`: fine-tunes language models with LoRA, on this machine.

mod commands;
mod job;
mod local;
mod output;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::commands::{generate, plan, quickstart, run, verify, worker};

/// Fine-tune language models with LoRA.
///
/// Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 error, 2 wrong usage, 3 the job failed,
/// 4 the job was paused or stopped.
#[derive(Debug, Parser)]
#[command(name = "loractl", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Args),
    Plan(plan::Args),
    Generate(generate::Args),
    Verify(verify::Args),
    Quickstart(quickstart::Args),
    #[command(hide = true)]
    Worker(worker::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn")))
        .with_writer(std::io::stderr)
        .init();
    let ended = match cli.command {
        Command::Run(args) => run::execute(args),
        Command::Plan(args) => plan::execute(args),
        Command::Generate(args) => generate::execute(args),
        Command::Verify(args) => verify::execute(args),
        Command::Quickstart(args) => quickstart::execute(args),
        Command::Worker(args) => worker::execute(args),
    };
    ended.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
