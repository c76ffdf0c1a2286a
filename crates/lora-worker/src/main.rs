//! `lora-worker`: the daemon that trains the jobs that a coordinator assigns.

mod probe_command;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lora_daemon::program::Flags;
use lora_daemon::shutdown::ShutdownSignals;
use lora_spec::DeviceSpec;
use lora_worker::{Config, WorkerError, end_with_stdin, run};

/// `loractl` reads from the last word whether this build supports GPUs.
#[cfg(feature = "cuda")]
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " cuda");
#[cfg(not(feature = "cuda"))]
const VERSION: &str = env!("CARGO_PKG_VERSION");

const EXAMPLE: &str = "\
Examples:
  lora-worker --config worker.toml --set coordinator=http://coordinator:7400
  lora-worker --config worker.toml --device cuda:1

Settings come from the file, then from environment variables (LORA__SECTION__KEY), then from --set.
Exit codes: 0 ended by a signal, 1 error, 2 wrong usage or settings.";

/// Train the jobs that a coordinator assigns, together with other workers.
#[derive(Debug, Parser)]
#[command(
    name = "lora-worker",
    version = VERSION,
    args_conflicts_with_subcommands = true,
    after_help = EXAMPLE
)]
struct Cli {
    #[command(flatten)]
    flags: Flags,
    /// Device to compute on: auto, cpu or cuda:N [default: the setting `device`]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceSpec>,
    /// Exit at once when stdin is closed.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(hide = true)]
    Probe(probe_command::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(Command::Probe(args)) = cli.command {
        return probe_command::execute(&args);
    }
    let daemon = async |mut config: Config, signals: ShutdownSignals| {
        if cli.end_with_stdin {
            let immediate = signals.immediate.clone();
            end_with_stdin(move || immediate.cancel()).map_err(WorkerError::Thread)?;
        }
        config.device = cli.device.unwrap_or(config.device);
        run(config, signals.stop.clone(), signals.immediate.clone()).await
    };
    cli.flags.run(Config::check, |config| &config.log, daemon)
}
