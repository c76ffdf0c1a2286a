//! What `cancel` and `pause` have in common: the same for each of some jobs.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use lora_proto::v1;

use crate::client::{CallError, Client};
use crate::job_lookup;
use crate::job_watch::{JobWatch, WatchStart};
use crate::output::{Format, JobView, job_grid};

/// How long a coordinator that is away is waited for.
const WAIT_TIMEOUT: Duration = Duration::from_secs(300);

/// Does `call` with each of the `wanted` jobs, and waits until each rests if asked to. A job that it cannot be done with
/// is named, and the others are done.
pub(crate) async fn apply_to_each(
    client: &Client,
    wanted: &[String],
    wait: bool,
    format: Format,
    call: impl AsyncFn(String) -> Result<v1::Job, CallError>,
) -> Result<ExitCode> {
    let mut jobs = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for wanted in wanted {
        let changed = async { Ok(call(job_lookup::find(client, wanted).await?.job_id).await?) };
        match changed.await {
            Ok(job) => jobs.push(job),
            Err(error) => code = report_skipped(wanted, error)?,
        }
    }
    if wait {
        for job in &mut jobs {
            eprintln!("waiting for job {}", job.job_id);
            *job = wait_until_rested(client, job).await?;
        }
    }
    let views: Vec<JobView> = jobs.iter().cloned().map(Into::into).collect();
    if !views.is_empty() || format != Format::Table {
        format.print(&views, || job_grid(&jobs).fitted())?;
    }
    Ok(code)
}

/// Says why not, unless there is no use in going on.
fn report_skipped(wanted: &str, error: anyhow::Error) -> Result<ExitCode> {
    if let Some(CallError::Unreachable { .. }) = error.downcast_ref() {
        return Err(error);
    }
    eprintln!("error: {wanted}: {error:#}");
    Ok(ExitCode::FAILURE)
}

/// The job once it rests.
async fn wait_until_rested(client: &Client, job: &v1::Job) -> Result<v1::Job> {
    let mut watch = JobWatch::start(client, job, WatchStart { event: 1, after_step: None }, WAIT_TIMEOUT);
    while watch.next().await?.is_some() {}
    Ok(client.job(&job.job_id).await?)
}
