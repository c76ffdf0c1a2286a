//! Holds every operation, the gradients and whole steps on a GPU against the CPU's (see `tests/gpu/selftest.sh`), and times
//! operations.

use anyhow::Result;
use clap::Parser;

#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod checks;
#[cfg(feature = "cuda")]
mod golden;
#[cfg(feature = "cuda")]
mod memory;
#[cfg(feature = "cuda")]
mod microbench;
#[cfg(feature = "cuda")]
mod ops;
#[cfg(feature = "cuda")]
mod steps;

/// Check every operation, the gradients and whole steps on a GPU against the CPU's, or time operations
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    /// The GPU
    #[arg(long, default_value = "cuda:0")]
    device: lora_spec::DeviceSpec,
    /// Only checks, or with --bench operations, whose name contains this
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
    /// Time operations at the shapes of Llama-3.1-8B instead of checking them
    #[arg(long)]
    bench: bool,
    /// With --bench: write the times to this file as JSON too
    #[arg(long, requires = "bench")]
    json: Option<std::path::PathBuf>,
    /// Divide the sizes of --bench, for simulated GPUs
    #[arg(long, default_value = "1", hide = true)]
    bench_scale: std::num::NonZeroUsize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    #[cfg(feature = "cuda")]
    return if args.bench { microbench::run(&args) } else { checks::run(&args) };
    #[cfg(not(feature = "cuda"))]
    anyhow::bail!("this program was built without the feature `cuda`: {} is not reached", args.device)
}
