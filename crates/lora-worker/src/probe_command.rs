//! `lora-worker probe`: measurements for `loractl doctor`, as JSON.

use std::io;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use lora_collective::backend_choice::Collective;
use lora_collective::{nccl_log_variable, shared_gpu_variables};
use lora_spec::DeviceSpec;
use lora_train::gpus;
use lora_worker::probe::{ProbeError, all_reduce, device_of_rank, read, run_rank};

/// Measure a device and print the results as JSON.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device. In an all-reduce, auto assigns the machine's GPUs to the ranks round-robin, and
    /// cuda:N is the GPU of rank 0.
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceSpec::Auto)]
    device: DeviceSpec,
    /// Only measure an all-reduce of a vector, among this many processes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=64))]
    all_reduce: Option<u16>,
    /// Transport of the all-reduce: auto, nccl or tcp.
    #[arg(long, value_name = "COLLECTIVE", default_value_t = Collective::Auto)]
    collective: Collective,
    /// Run as this rank of the all-reduce.
    #[arg(long, value_name = "N", requires = "all_reduce")]
    rank: Option<usize>,
    /// Time limit of the all-reduce in seconds, from the start of its processes.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 120,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    timeout: u32,
}

pub(crate) fn execute(args: &Args) -> ExitCode {
    match probe(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn probe(args: &Args) -> Result<(), ProbeError> {
    let limit = Duration::from_secs(args.timeout.into());
    let reading = match (args.all_reduce, args.rank) {
        (None, _) => serde_json::to_string(&read(args.device)?),
        (Some(_), Some(rank)) => return run_rank(rank, args.device, args.collective, limit),
        (Some(ranks), None) => {
            let executable = std::env::current_exe()?;
            // Counting the GPUs initializes the driver. Only the ranks do that, within the limit,
            // unless their devices depend on the count.
            let gpus = if args.device == DeviceSpec::Auto { gpus() } else { 0 };
            let process = |rank| process(&executable, args, gpus, ranks, rank);
            serde_json::to_string(&all_reduce(ranks.into(), limit, process)?)
        }
    };
    println!("{}", reading.map_err(io::Error::from)?);
    Ok(())
}

/// Creates the process of a rank of an all-reduce.
fn process(executable: &Path, args: &Args, gpus: usize, ranks: u16, rank: usize) -> Command {
    let device = device_of_rank(args.device, gpus, rank);
    let mut command = Command::new(executable);
    command.args(["probe", "--all-reduce", &ranks.to_string(), "--rank", &rank.to_string()]).args([
        "--device",
        &device.to_string(),
        "--collective",
        &args.collective.to_string(),
        "--timeout",
        &args.timeout.to_string(),
    ]);
    let is_set = |name: &str| std::env::var_os(name).is_some();
    let shares_gpu = args.device == DeviceSpec::Auto && (1..usize::from(ranks)).contains(&gpus);
    if shares_gpu && args.collective == Collective::Nccl {
        command.envs(shared_gpu_variables(rank, is_set));
    }
    command.envs(nccl_log_variable(is_set));
    command
}
