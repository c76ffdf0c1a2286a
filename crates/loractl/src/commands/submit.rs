//! `loractl submit`: submits a job to the coordinator.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use lora_plan::Plan;
use lora_spec::JobFile;

use super::{online, watch};
use crate::job_check;
use crate::job_upload::{BaseLocation, JobUpload};
use crate::output::{Format, JobView, Table, parse_bytes};
use crate::submit::{SubmitOptions, hashing_bar, random_key, submit};

/// Submit a job to the coordinator
///
/// The job is checked as by `loractl plan`. Then its data is uploaded, and its base if
/// all files together have at most --max-upload. Files that the coordinator already
/// has are not uploaded again.
///
/// A larger base, or a base that is not on this machine, is named by its path: each
/// worker needs it under its model_roots. A base at hf://org/name or
/// s3://bucket/prefix is fetched by the workers.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl submit job.yaml
  loractl submit job.yaml --watch
  id=$(loractl submit job.yaml -o json | jq -r .job_id)
  loractl submit job.yaml --idempotency-key nightly-2026-03-01 --priority 10"
)]
pub(crate) struct Args {
    /// Job file.
    #[arg(value_name = "JOB.YAML")]
    job: PathBuf,
    /// Largest base to upload, all files together: bytes, or a size such as 500MiB or 2GiB.
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = parse_bytes)]
    max_upload: u64,
    /// Submitting again with the same key returns the same job [default: a random key]
    #[arg(long, value_name = "KEY", value_parser = key)]
    idempotency_key: Option<String>,
    /// Priority from -100 to 100; jobs with a higher one are scheduled first.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true,
        value_parser = clap::value_parser!(i32).range(-100..=100))]
    priority: i32,
    /// Watch the job until it stops.
    #[arg(long)]
    watch: bool,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    let file = JobFile::read(&args.job)?;
    let (base, plan) = checked_base(&file, &args.job, args.max_upload)?;
    // With --watch they are among the job's events, if the coordinator can plan the job.
    let is_shown_later = args.watch && matches!(base, BaseLocation::Uploaded(_));
    plan.iter().filter(|_| !is_shown_later).for_each(job_check::show_notes);
    let bar = hashing_bar();
    let inputs = JobUpload::collect(&file, base, plan.iter().flat_map(Plan::token_files), &bar)?;
    bar.finish_and_clear();
    let options = SubmitOptions {
        idempotency_key: args.idempotency_key.unwrap_or_else(random_key),
        priority: args.priority,
    };
    online(coordinator, async |client| {
        let job = submit(&client, &file, &inputs, &options).await?;
        let mut table = Table::new();
        table.row("job", &job.job_id);
        table.row("name", &job.name);
        table.row("state", &job.state);
        let view = JobView::from(job.clone());
        if !args.watch {
            args.output.print(&view, || table.to_string())?;
            eprintln!("watch it with: loractl watch {}", job.job_id);
            return Ok(ExitCode::SUCCESS);
        }
        watch::print_job(args.output, view, || table.to_string())?;
        watch::to_the_end(&client, job, watch::WatchOptions::new(args.output)).await
    })
}

/// Checks the job as far as this machine can, and decides how the workers get its base. Without the
/// base there is no plan.
fn checked_base(file: &JobFile, path: &Path, max_upload: u64) -> Result<(BaseLocation, Option<Plan>)> {
    let dir = std::path::absolute(path)?.parent().map(Path::to_owned).unwrap_or_default();
    if file.job.model.base_url().is_none() && file.job.model.base.is_dir() {
        let plan = job_check::check(file)?;
        return Ok((BaseLocation::choose(file, &dir, max_upload)?, Some(plan)));
    }
    let base = BaseLocation::choose(file, &dir, max_upload)?;
    job_check::check_without_base(file)?;
    Ok((base, None))
}

/// Parses an idempotency key, whose length the protocol limits.
fn key(key: &str) -> Result<String> {
    const MAX_BYTES: usize = 128;
    if key.is_empty() || key.len() > MAX_BYTES {
        bail!("must have 1 to {MAX_BYTES} bytes, not {}", key.len());
    }
    Ok(key.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_idempotency_keys_are_rejected() {
        assert!(key("").is_err() && key(&"k".repeat(129)).is_err());
        assert_eq!(key("nightly").unwrap(), "nightly");
    }
}
