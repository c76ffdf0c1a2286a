//! The common part of `cancel` and `pause`: the same call for each of several jobs.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use lora_daemon::program::error_chain;
use lora_proto::v1;

use crate::client::{CallError, Client};
use crate::job_lookup;
use crate::job_watch::{JobWatch, WatchStart};
use crate::output::{Format, JobView, job_grid};

/// How long to wait for an unreachable coordinator.
const WAIT_TIMEOUT: Duration = Duration::from_secs(300);

/// Runs `call` for each of the `wanted` jobs (ids or prefixes). With `wait`, waits until each of
/// these jobs has stopped. If the call fails for a job, the error is printed and the next job
/// follows.
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
            *job = wait_until_stopped(client, job).await?;
        }
    }
    let views: Vec<JobView> = jobs.iter().cloned().map(Into::into).collect();
    if !views.is_empty() || format != Format::Table {
        format.print(&views, || job_grid(&jobs).fitted())?;
    }
    Ok(code)
}

/// Prints the error of one job. Returns the error if the coordinator is unreachable, because then
/// the calls for the other jobs would fail too.
fn report_skipped(wanted: &str, error: anyhow::Error) -> Result<ExitCode> {
    if let Some(CallError::Unreachable { .. }) = error.downcast_ref() {
        return Err(error);
    }
    eprintln!("error: {wanted}: {}", error_chain(error.as_ref()));
    Ok(ExitCode::FAILURE)
}

/// Waits until the job has stopped, and returns it.
async fn wait_until_stopped(client: &Client, job: &v1::Job) -> Result<v1::Job> {
    let mut watch = JobWatch::start(client, job, WatchStart { event: 1, after_step: None }, WAIT_TIMEOUT);
    while watch.next().await?.is_some() {}
    Ok(client.job(&job.job_id).await?)
}
