//! `loractl download`: a job's result.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use serde::Serialize;

use super::online;
use crate::download::{download_result, is_file_name};
use crate::job_lookup;
use crate::output::{Format, Table};

/// Fetch the result of a job that succeeded.
///
/// The adapter as PEFT reads it, the tokenizer's files, metrics.jsonl and receipt.json. Each file is held against its
/// hash. A download that was interrupted goes on where it was; files of other origin are not overwritten.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  loractl download 3f2a
  loractl download 3f2a --out runs/dates")]
pub(crate) struct Args {
    /// The job's id, or as much of its start as no other has.
    #[arg(value_name = "JOB")]
    job: String,
    /// Directory of the result; made if it is not there [default: the job's name]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Serialize)]
struct Downloaded {
    job_id: String,
    output_dir: PathBuf,
    files: Vec<String>,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let job = job_lookup::find(&client, &args.job).await?;
        if job.state != "succeeded" {
            bail!("job {} is {}; it has a result once it has succeeded", job.job_id, job.state);
        }
        let output_dir = match args.out {
            Some(dir) => dir,
            None if is_file_name(&job.name) => PathBuf::from(".").join(&job.name),
            None => bail!("the job's name {:?} makes no directory; give one with --out", job.name),
        };
        download_result(&client, &job, &output_dir, &[]).await?;
        let files = job.result.into_iter().map(|file| file.name).collect();
        let downloaded = Downloaded { job_id: job.job_id, output_dir, files };
        args.output.print(&downloaded, || {
            let mut table = Table::new();
            table.row("job", &downloaded.job_id);
            table.row("files", downloaded.files.len());
            table.row("result", downloaded.output_dir.display());
            table.to_string()
        })?;
        Ok(ExitCode::SUCCESS)
    })
}
