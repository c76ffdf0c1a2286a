//! Compares every operation, the gradients and whole steps on a GPU with the CPU's (see
//! `tests/gpu/selftest.sh`), and measures the times of operations.

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

/// Compare every operation, the gradients and whole steps on a GPU with the CPU's, or time
/// operations
#[derive(Debug, Parser)]
#[command(version, after_help = "Example:\n  lora-gpu --device cuda:0 --only rms_norm")]
pub(crate) struct Args {
    /// GPU to check
    #[arg(long, default_value = "cuda:0")]
    device: lora_spec::DeviceSpec,
    /// Run only checks (with --bench: operations) whose name contains this text
    #[arg(long, default_value = "")]
    only: String,
    /// Seed of the inputs [default: random]
    #[arg(long)]
    seed: Option<u64>,
    /// Directory of the golden files
    #[arg(long, default_value = "tests/golden")]
    golden: std::path::PathBuf,
    /// Directory with the base and the data of the training steps
    #[arg(long, default_value = "examples/dates")]
    example: std::path::PathBuf,
    /// Time operations at the shapes of Llama-3.1-8B instead of checking them
    #[arg(long)]
    bench: bool,
    /// With --bench, also write the times to this file as JSON
    #[arg(long, requires = "bench")]
    json: Option<std::path::PathBuf>,
    /// Divide the sizes of --bench by this number, for simulated GPUs
    #[arg(long, default_value = "1", hide = true)]
    bench_scale: std::num::NonZeroUsize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    #[cfg(feature = "cuda")]
    return if args.bench { microbench::run(&args) } else { checks::run(&args) };
    #[cfg(not(feature = "cuda"))]
    anyhow::bail!(
        "invalid device {}: this program was built without GPU support; build it with the feature `cuda`",
        args.device
    )
}
