//! `loractl list`: lists jobs.

use std::process::ExitCode;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use lora_spec::JobState;

use super::online;
use crate::job_lookup;
use crate::output::{Format, JobView, job_grid};

/// List jobs, newest first
///
/// Wide columns are cut to the width of the terminal. `loractl status JOB` and
/// `loractl list -o json` show complete values.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl list
  loractl list --state running --state queued
  loractl list --limit 1000 -o json | jq -r '.[].job_id'"
)]
pub(crate) struct Args {
    /// List only jobs in this state; can be repeated.
    #[arg(long, value_name = "STATE",
        value_parser = PossibleValuesParser::new(JobState::ALL.map(JobState::name)))]
    state: Vec<String>,
    /// Maximum number of jobs.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let jobs = job_lookup::list(&client, &args.state, Some(args.limit)).await?;
        if jobs.is_empty() && args.output == Format::Table {
            eprintln!("no jobs");
            return Ok(ExitCode::SUCCESS);
        }
        let views: Vec<JobView> = jobs.iter().cloned().map(Into::into).collect();
        args.output.print(&views, || job_grid(&jobs).fitted())?;
        Ok(ExitCode::SUCCESS)
    })
}
