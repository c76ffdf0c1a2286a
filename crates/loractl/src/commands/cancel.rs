//! `loractl cancel`: cancels jobs.

use std::process::ExitCode;

use anyhow::Result;
use lora_proto::v1;

use super::{apply_to_jobs, online};
use crate::output::Format;

/// Cancel jobs
///
/// A cancelled job cannot be resumed. To continue a job later, use `loractl pause`.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl cancel 3f2a
  loractl cancel 3f2a 77b0 --wait
  loractl cancel $(loractl list --state queued -o json | jq -r '.[].job_id')"
)]
pub(crate) struct Args {
    /// Job ids, or unique prefixes of them.
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
    /// Wait until the workers have freed the memory of the jobs.
    #[arg(long)]
    wait: bool,
    /// Output format.
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
