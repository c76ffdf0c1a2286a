//! `lora-coordinator`: the daemon that accepts fine-tuning jobs and gives them to workers.

use std::process::ExitCode;

use clap::Parser;
use lora_coordinator::{Config, run};
use lora_daemon::program::Flags;

const EXAMPLE: &str = "\
Example:
  lora-coordinator --config coordinator.toml --set state_dir=/data/coordinator

Settings come from the file, then from environment variables (LORA__SECTION__KEY), then from --set.
Exit codes: 0 ended by a signal, 1 error, 2 wrong usage or settings.";

/// Accepts fine-tuning jobs over gRPC and gives them to workers.
#[derive(Debug, Parser)]
#[command(name = "lora-coordinator", version, after_help = EXAMPLE)]
struct Cli {
    #[command(flatten)]
    flags: Flags,
}

fn main() -> ExitCode {
    let Cli { flags } = Cli::parse();
    flags.run(
        Config::check,
        |config| &config.log,
        async |config, signals| run(config, signals.stop.clone(), signals.immediate.clone()).await,
    )
}
