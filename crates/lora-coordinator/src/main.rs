//! `lora-coordinator`: the daemon that accepts fine-tuning jobs and gives them to workers.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use lora_coordinator::Config;
use lora_daemon::{config, log, shutdown};
use tokio::runtime::Runtime;

const EXAMPLE: &str = "\
Example:
  lora-coordinator --config coordinator.toml --set state_dir=/data/coordinator

Settings come from the file, then from environment variables (LORA__SECTION__KEY), then from --set.
Exit codes: 0 ended by a signal, 1 error, 2 wrong usage or settings.";

/// Accepts fine-tuning jobs over gRPC and gives them to workers.
#[derive(Debug, Parser)]
#[command(name = "lora-coordinator", version, after_help = EXAMPLE)]
struct Cli {
    /// TOML file with settings.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting, such as grpc.listen=0.0.0.0:7400; can be given several times.
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
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "ended");
            ExitCode::FAILURE
        }
    }
}

fn serve(config: Config) -> Result<()> {
    let runtime = Runtime::new().context("cannot start threads")?;
    let ended = runtime.block_on(async {
        let signals = shutdown::signals().context("cannot listen for signals")?;
        tokio::select! {
            ended = lora_coordinator::run(config, signals.stop.clone()) => Ok(ended?),
            () = signals.at_once.cancelled() => bail!("a second signal came before everything had ended"),
        }
    });
    // What still blocks a thread is of no use to anybody.
    runtime.shutdown_background();
    ended
}
