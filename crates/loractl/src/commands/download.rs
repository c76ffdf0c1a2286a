//! `loractl download`: downloads the result of a job.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use lora_proto::file_name::is_file_name;
use serde::Serialize;

use super::online;
use crate::download::download_result;
use crate::job_lookup;
use crate::output::{Format, Table};

/// Download the result of a job that succeeded
///
/// The result consists of the adapter in PEFT's format, the tokenizer files,
/// metrics.jsonl and receipt.json. Each file is checked against its hash. An
/// interrupted download continues where it stopped. Existing files with other
/// contents are not overwritten.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl download 3f2a
  loractl download 3f2a --out runs/dates"
)]
pub(crate) struct Args {
    /// Job id, or a unique prefix of it.
    #[arg(value_name = "JOB")]
    job: String,
    /// Output directory, created if it does not exist [default: the job's name]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Output format.
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
            bail!("job {} is {}; only a job that succeeded has a result", job.job_id, job.state);
        }
        let output_dir = match args.out {
            Some(dir) => dir,
            None if is_file_name(&job.name) => PathBuf::from(".").join(&job.name),
            None => bail!("the job's name {:?} is not a directory name; give one with --out", job.name),
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
