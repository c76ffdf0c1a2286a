//! `loractl workers`: who is there to train.

use std::process::ExitCode;

use anyhow::Result;
use lora_proto::v1;

use super::online;
use crate::output::{Format, WorkerView, worker_grid};

/// List the workers that are connected, or held for a job
///
/// SILENT is the time since a worker's last sign of life. Workers of one KIND can share a job.
/// MEMORY is what a job may take there, of a GPU's memory or of the machine's.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  loractl workers
  loractl workers -o json | jq -r '.[] | select(.state == \"idle\").name'")]
pub(crate) struct Args {
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let answer = client.call(client.jobs().list_workers(v1::ListWorkersRequest {})).await?;
        if answer.workers.is_empty() && args.output == Format::Table {
            eprintln!("no workers; start some (lora-worker)");
            return Ok(ExitCode::SUCCESS);
        }
        let workers: Vec<WorkerView> = answer.workers.into_iter().map(Into::into).collect();
        args.output.print(&workers, || worker_grid(&workers).fitted())?;
        Ok(ExitCode::SUCCESS)
    })
}
