//! Checks of the engine on a GPU, and measurements: see `tests/gpu/selftest.sh` and `benches/gpu/`.

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod checks;
#[cfg(feature = "cuda")]
mod golden;
#[cfg(feature = "cuda")]
mod ops;
#[cfg(feature = "cuda")]
mod steps;

/// Checks and measurements of the engine on a GPU.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Holds every operation, the gradients and whole steps on the GPU against the CPU's
    Check(CheckArgs),
    /// Times training steps at a published model's shape with random weights
    Bench(bench::BenchArgs),
}

/// What to check.
#[derive(Debug, clap::Args)]
pub(crate) struct CheckArgs {
    /// The GPU
    #[arg(long, default_value = "cuda:0")]
    device: lora_spec::Device,
    /// Only checks whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Seed of the inputs; default: another one each time
    #[arg(long)]
    seed: Option<u64>,
    /// Directory of the golden values
    #[arg(long, default_value = "tests/golden")]
    golden: std::path::PathBuf,
    /// Directory of the example that steps are trained on
    #[arg(long, default_value = "examples/dates")]
    example: std::path::PathBuf,
}

fn main() -> Result<()> {
    let Cli { command } = Cli::parse();
    match command {
        Command::Bench(args) => bench::run(&args),
        #[cfg(feature = "cuda")]
        Command::Check(args) => checks::run(&args),
        #[cfg(not(feature = "cuda"))]
        Command::Check(_) => {
            anyhow::bail!("this program was built without the feature `cuda`: there is nothing to check")
        }
    }
}
