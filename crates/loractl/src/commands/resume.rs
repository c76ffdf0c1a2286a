//! `loractl resume`: resumes a paused or failed job.

use std::process::ExitCode;

use anyhow::{Result, bail};
use lora_proto::v1;
use lora_spec::WorkersSpec;

use super::{online, watch};
use crate::job_lookup;
use crate::output::{Format, JobView, Table};

/// Resume a paused or failed job
///
/// The job is queued again and continues from its newest checkpoint.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl resume 3f2a
  loractl resume 3f2a --workers 4
  loractl resume 3f2a --workers 2..8 --watch"
)]
pub(crate) struct Args {
    /// Job id, or a unique prefix of it.
    #[arg(value_name = "JOB")]
    job: String,
    /// New number of workers [default: unchanged]
    #[arg(long, value_name = "MIN[..MAX]", value_parser = workers)]
    workers: Option<WorkersSpec>,
    /// Watch the job until it stops.
    #[arg(long)]
    watch: bool,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let job_id = job_lookup::find(&client, &args.job).await?.job_id;
        let request = v1::ResumeJobRequest { job_id, workers: args.workers.as_ref().map(Into::into) };
        let job = client.call(client.jobs().resume_job(request)).await?;
        let mut table = Table::new();
        table.row("job", &job.job_id);
        table.row("state", &job.state);
        let view = JobView::from(job.clone());
        if !args.watch {
            args.output.print(&view, || table.to_string())?;
            return Ok(ExitCode::SUCCESS);
        }
        watch::print_job(args.output, view, || table.to_string())?;
        watch::to_the_end(&client, job, watch::WatchOptions::new(args.output)).await
    })
}

/// Parses `N` (exactly N workers) or `MIN..MAX`.
fn workers(text: &str) -> Result<WorkersSpec> {
    let (min, max) = text.split_once("..").unwrap_or((text, text));
    match (min.trim().parse(), max.trim().parse()) {
        (Ok(min @ 1..), Ok(max)) if min <= max => Ok(WorkersSpec { min, max }),
        _ => bail!("must be a number from 1 on, or a range such as 2..8"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_a_number_or_a_range() {
        let range = |text| workers(text).map(|WorkersSpec { min, max }| (min, max));
        assert_eq!((range("3").unwrap(), range("2..8").unwrap()), ((3, 3), (2, 8)));
        for text in ["", "0", "0..2", "4..2", "2..", "..2", "-1", "2...8"] {
            assert!(range(text).is_err(), "{text}");
        }
    }
}
