//! `lora-worker probe`: readings for `loractl doctor`, as JSON.

use std::io;
use std::path::Path;
use std::process::{Command, ExitCode};

use lora_collective::device::Collective;
use lora_spec::Device;
use lora_worker::probe::{ProbeError, all_reduce, read, take_part};

/// Take short readings of a device and tell them as JSON.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device; of an all-reduce on GPUs, the first of them.
    #[arg(long, value_name = "DEVICE", default_value_t = Device::Auto)]
    device: Device,
    /// Only all-reduce a vector, among this many processes, each with the next device.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=64))]
    all_reduce: Option<u16>,
    /// What carries it: auto, nccl or tcp.
    #[arg(long, value_name = "COLLECTIVE", default_value_t = Collective::Auto)]
    collective: Collective,
    /// Be one of those processes.
    #[arg(long, value_name = "N", requires = "all_reduce")]
    rank: Option<usize>,
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
    let reading = match (args.all_reduce, args.rank) {
        (None, _) => serde_json::to_string(&read(args.device)?),
        (Some(_), Some(rank)) => return take_part(rank, args.device, args.collective),
        (Some(ranks), None) => {
            let executable = std::env::current_exe()?;
            serde_json::to_string(&all_reduce(ranks.into(), |rank| process(&executable, args, ranks, rank))?)
        }
    };
    println!("{}", reading.map_err(io::Error::from)?);
    Ok(())
}

/// The process of a rank of an all-reduce.
fn process(executable: &Path, args: &Args, ranks: u16, rank: usize) -> Command {
    let device = match args.device {
        Device::Cuda(first) => Device::Cuda(first + rank),
        other => other,
    };
    let mut command = Command::new(executable);
    command.args(["probe", "--all-reduce", &ranks.to_string(), "--rank", &rank.to_string()]).args([
        "--device",
        &device.to_string(),
        "--collective",
        &args.collective.to_string(),
    ]);
    command
}
