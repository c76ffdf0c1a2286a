//! `loractl workers`: lists workers.

use std::process::ExitCode;

use anyhow::Result;
use lora_proto::v1;

use super::online;
use crate::output::{Format, WorkerView, worker_grid};

/// List workers that are connected or belong to a job
///
/// SILENT is the time since the worker's last heartbeat. MEMORY is the memory that a
/// job may use on the worker, of the GPU or of the machine. Workers of the same KIND
/// can share a job.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl workers
  loractl workers -o json | jq -r '.[] | select(.state == \"idle\").name'"
)]
pub(crate) struct Args {
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let answer = client.call(client.jobs().list_workers(v1::ListWorkersRequest {})).await?;
        if answer.workers.is_empty() && args.output == Format::Table {
            eprintln!("no workers are connected; start one with lora-worker");
            return Ok(ExitCode::SUCCESS);
        }
        let workers: Vec<WorkerView> = answer.workers.into_iter().map(Into::into).collect();
        args.output.print(&workers, || worker_grid(&workers).fitted())?;
        Ok(ExitCode::SUCCESS)
    })
}
