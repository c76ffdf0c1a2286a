//! `lora-worker`: the daemon that trains what the coordinator gives it.

use std::process::ExitCode;

use clap::Parser;
use lora_daemon::program::Flags;
use lora_worker::{Config, run};

const EXAMPLE: &str = "\
Example:
  lora-worker --config worker.toml --set coordinator=http://coordinator:7400

Settings come from the file, then from environment variables (LORA__SECTION__KEY), then from --set.
Exit codes: 0 ended by a signal, 1 error, 2 wrong usage or settings.";

/// Trains the jobs that a coordinator gives it, together with other workers.
#[derive(Debug, Parser)]
#[command(name = "lora-worker", version, after_help = EXAMPLE)]
struct Cli {
    #[command(flatten)]
    flags: Flags,
}

fn main() -> ExitCode {
    let Cli { flags } = Cli::parse();
    flags.run(
        Config::check,
        |config| &config.log,
        async |config, signals| run(config, signals.stop.clone(), signals.at_once.clone()).await,
    )
}
