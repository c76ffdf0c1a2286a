//! `loractl run`: runs a job on this machine.

use std::path::PathBuf;
use std::process::ExitCode;

use lora_collective::backend_choice::Collective;
use lora_spec::JobState;

use crate::exit;
use crate::local::{DeviceChoice, RunOptions, run_job};
use crate::output::Format;

/// Run a job on this machine
///
/// The command starts worker processes, trains, and writes a PEFT adapter to the output
/// directory. The result has the same bits with any number of workers. A worker process
/// that dies is started again, and no step is lost.
///
/// Ctrl-C pauses the job with a checkpoint; the same command with --resume continues
/// it. The state of an unfinished job is in .run in the output directory, which is
/// removed when the job has succeeded.
///
/// On GPUs, each worker is a process of an installed lora-worker that was built for
/// CUDA. `loractl doctor` shows whether this machine has what this needs.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl run job.yaml --out runs/dates
  loractl run job.yaml --workers 2 --threads 4 --out runs/dates
  loractl run job.yaml --device cuda --out runs/dates
  loractl run job.yaml --workers 3 --out runs/dates --resume
  loractl run job.yaml --out runs/dates -o json | jq .loss"
)]
pub(crate) struct Args {
    /// Job file.
    #[arg(value_name = "JOB")]
    job: PathBuf,
    /// Number of worker processes, at most the micro-batches of a step; several may share a GPU
    /// [default: 1, or one for each GPU]
    #[arg(long, value_name = "N", value_parser = count)]
    workers: Option<usize>,
    /// Device of the workers; auto uses GPUs if they and a lora-worker for them are found.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Transport of gradients between GPUs: auto, nccl or tcp
    ///
    /// With auto, workers that share a GPU use TCP, unless NCCL_MULTI_RANK_GPU_ENABLE is 1
    /// and NCCL is 2.30 or newer. With nccl, each worker that shares a GPU gets its own
    /// NCCL_HOSTID, and NCCL connects these workers by TCP sockets on the loopback
    /// interface, unless NCCL_NET and NCCL_SOCKET_IFNAME are set to something else.
    #[arg(
        long,
        value_name = "COLLECTIVE",
        default_value_t = Collective::Auto,
        verbatim_doc_comment
    )]
    collective: Collective,
    /// Path of the lora-worker for GPUs [default: beside loractl, then on PATH]
    #[arg(long, value_name = "PATH")]
    worker: Option<PathBuf>,
    /// Output directory; metrics.jsonl in it grows while the job trains.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Compute threads of each worker [default: the machine's cores divided by the workers]
    #[arg(long, value_name = "T", value_parser = count)]
    threads: Option<usize>,
    /// Continue the unfinished run in the output directory from its newest checkpoint.
    #[arg(long)]
    resume: bool,
    /// Format of the summary that is printed at the end.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args) -> anyhow::Result<ExitCode> {
    let Args { job, workers, device, collective, worker, out, threads, resume, output } = args;
    let options = RunOptions { job, workers, device, collective, worker, output_dir: out, threads, resume };
    let summary = run_job(&options)?;
    // If the job never began to train, the table would have no values.
    if output != Format::Table || summary.total_steps > 0 {
        output.print(&summary, || summary.table().to_string())?;
    }
    if let Some(failure) = &summary.failure {
        eprintln!("error: the job failed: {failure}");
    } else if summary.state == JobState::Paused {
        eprintln!("paused after step {}; continue with the same command and --resume", summary.steps);
    }
    Ok(exit::from_state(summary.state.name()))
}

/// Parses a number of processes or threads, from 1 to 1024.
fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=1024) => Ok(count),
        Ok(_) => Err("must be from 1 to 1024".into()),
        Err(error) => Err(format!("{error}")),
    }
}
