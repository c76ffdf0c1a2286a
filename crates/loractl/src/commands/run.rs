//! `loractl run`: a job on this machine.

use std::path::PathBuf;
use std::process::ExitCode;

use lora_collective::backend_choice::Collective;
use lora_spec::JobState;

use crate::exit;
use crate::local::{DeviceChoice, RunOptions, run_job};
use crate::output::Format;

/// Run a job on this machine.
///
/// Starts worker processes, trains, and leaves the adapter in the output directory as PEFT reads it. The result does not
/// depend on the number of workers, bit by bit. A worker process that dies is started again, and no step is lost. Ctrl-C
/// pauses with a checkpoint; --resume goes on from there. What the job needs to go on lies in the output directory's .run,
/// which a finished job leaves no more.
///
/// On GPUs an installed lora-worker computes that was built for CUDA, a process a GPU; `loractl doctor` says whether this
/// machine has what that needs.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  loractl run job.yaml --out runs/dates
  loractl run job.yaml --workers 2 --threads 4 --out runs/dates
  loractl run job.yaml --device cuda --out runs/dates
  loractl run job.yaml --workers 3 --out runs/dates --resume
  loractl run job.yaml --out runs/dates -o json | jq .loss")]
pub(crate) struct Args {
    /// The job file.
    #[arg(value_name = "JOB")]
    job: PathBuf,
    /// Worker processes; at most the micro-batches of a step. More than there are GPUs share them
    /// [default: 1, or one a GPU]
    #[arg(long, value_name = "N", value_parser = count)]
    workers: Option<usize>,
    /// What they compute on; auto takes GPUs where there are some and a lora-worker for them.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// What carries gradients between GPUs: auto, nccl or tcp.
    ///
    /// With auto, workers that share a GPU use TCP, unless NCCL_MULTI_RANK_GPU_ENABLE is 1 and NCCL
    /// is 2.30 or newer. With nccl, each of them gets its own NCCL_HOSTID, and NCCL connects them by
    /// TCP sockets on the loopback interface, unless NCCL_NET and NCCL_SOCKET_IFNAME are set to
    /// something else.
    #[arg(long, value_name = "COLLECTIVE", default_value_t = Collective::Auto)]
    collective: Collective,
    /// The lora-worker for GPUs [default: beside loractl, then on PATH]
    #[arg(long, value_name = "PATH")]
    worker: Option<PathBuf>,
    /// Directory of the result; metrics.jsonl grows there while the job trains.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Threads of each worker [default: the machine's cores, shared out]
    #[arg(long, value_name = "T", value_parser = count)]
    threads: Option<usize>,
    /// Go on with the unfinished run in the output directory, from its newest checkpoint.
    #[arg(long)]
    resume: bool,
    /// What is written to stdout at the end.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args) -> anyhow::Result<ExitCode> {
    let Args { job, workers, device, collective, worker, out, threads, resume, output } = args;
    let options = RunOptions { job, workers, device, collective, worker, output_dir: out, threads, resume };
    let summary = run_job(&options)?;
    // A job that never trained has nothing to show.
    if output != Format::Table || summary.total_steps > 0 {
        output.print(&summary, || summary.table().to_string())?;
    }
    if let Some(failure) = &summary.failure {
        eprintln!("error: the job failed: {failure}");
    } else if summary.state == JobState::Paused {
        eprintln!("paused after step {}; the same command with --resume goes on", summary.steps);
    }
    Ok(exit::from_state(summary.state.name()))
}

/// A count of processes or threads that a machine can have.
fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=1024) => Ok(count),
        Ok(_) => Err("must be from 1 to 1024".into()),
        Err(error) => Err(format!("{error}")),
    }
}
