//! `loractl pause`: a job's rest.

use std::process::ExitCode;

use anyhow::Result;
use lora_proto::v1;

use super::{apply_to_jobs, online};
use crate::output::Format;

/// Stop jobs after the step that is being computed, with a checkpoint.
///
/// `loractl resume` goes on from there, to the same bits.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  loractl pause 3f2a
  loractl pause 3f2a 77b0 --wait")]
pub(crate) struct Args {
    /// The jobs' ids, or as much of their starts as no others have.
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
    /// Wait until the jobs have stopped.
    #[arg(long)]
    wait: bool,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let pause = async |job_id| client.call(client.jobs().pause_job(v1::PauseJobRequest { job_id })).await;
        apply_to_jobs::apply_to_each(&client, &args.jobs, args.wait, args.output, pause).await
    })
}
