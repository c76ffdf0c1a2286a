//! `lora-worker`: the daemon that trains what the coordinator gives it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use lora_daemon::{config, log, shutdown};
use lora_worker::Config;
use tokio::runtime::Runtime;

const EXAMPLE: &str = "\
Example:
  lora-worker --config worker.toml --set coordinator=http://coordinator:7400

Settings come from the file, then from environment variables (LORA__SECTION__KEY), then from --set.
Exit codes: 0 ended by a signal, 1 error, 2 wrong usage or settings.";

/// Trains the jobs that a coordinator gives it, together with other workers.
#[derive(Debug, Parser)]
#[command(name = "lora-worker", version, after_help = EXAMPLE)]
struct Cli {
    /// TOML file with settings.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting, such as peer.listen=0.0.0.0:7410; can be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let settings = config::load(cli.config.as_deref(), &cli.sets, Config::check);
    let config = match settings {
        Ok(config) => config,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    log::init(&config.log);
    match work(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "ended");
            ExitCode::FAILURE
        }
    }
}

fn work(config: Config) -> Result<()> {
    let runtime = Runtime::new().context("cannot start threads")?;
    let ended = runtime.block_on(async {
        let signals = shutdown::signals().context("cannot listen for signals")?;
        lora_worker::run(config, signals.stop.clone(), signals.at_once.clone()).await?;
        Ok(())
    });
    // What still blocks a thread is of no use to anybody.
    runtime.shutdown_background();
    ended
}
