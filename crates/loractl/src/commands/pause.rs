//! `loractl pause`: pauses jobs.

use std::process::ExitCode;

use anyhow::Result;
use lora_proto::v1;

use super::{apply_to_jobs, online};
use crate::output::Format;

/// Pause jobs after their current step, with a checkpoint
///
/// `loractl resume` continues a paused job from this checkpoint, and the result has
/// the same bits as without the pause.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl pause 3f2a
  loractl pause 3f2a 77b0 --wait"
)]
pub(crate) struct Args {
    /// Job ids, or unique prefixes of them.
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
    /// Wait until the jobs have stopped.
    #[arg(long)]
    wait: bool,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let pause = async |job_id| client.call(client.jobs().pause_job(v1::PauseJobRequest { job_id })).await;
        apply_to_jobs::apply_to_each(&client, &args.jobs, args.wait, args.output, pause).await
    })
}
