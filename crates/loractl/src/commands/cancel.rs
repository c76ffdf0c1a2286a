//! `loractl cancel`: a job's end.

use std::process::ExitCode;

use anyhow::Result;
use lora_proto::v1;

use super::{apply_to_jobs, online};
use crate::output::Format;

/// End jobs for good.
///
/// A job that is cancelled cannot be resumed. To go on later, use `loractl pause`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  loractl cancel 3f2a
  loractl cancel 3f2a 77b0 --wait
  loractl cancel $(loractl list --state queued -o json | jq -r '.[].job_id')")]
pub(crate) struct Args {
    /// The jobs' ids, or as much of their starts as no others have.
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
    /// Wait until the workers have freed the jobs' memory.
    #[arg(long)]
    wait: bool,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let cancel =
            async |job_id| client.call(client.jobs().cancel_job(v1::CancelJobRequest { job_id })).await;
        apply_to_jobs::apply_to_each(&client, &args.jobs, args.wait, args.output, cancel).await
    })
}
