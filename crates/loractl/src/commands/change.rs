//! What `cancel` and `pause` have in common: the same for each of some jobs.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use lora_proto::v1;

use crate::client::{CallError, Client};
use crate::jobs;
use crate::output::{Format, JobView, job_grid};
use crate::watch::{From, Watch};

/// How long a coordinator that is away is waited for.
const PATIENCE: Duration = Duration::from_secs(300);

/// Does `call` with each of the `wanted` jobs, and waits until each rests if asked to. A job that it cannot be done with
/// is named, and the others are done.
pub(crate) async fn each(
    client: &Client,
    wanted: &[String],
    wait: bool,
    format: Format,
    call: impl AsyncFn(String) -> Result<v1::Job, CallError>,
) -> Result<ExitCode> {
    let mut jobs = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for wanted in wanted {
        let changed = async { Ok(call(jobs::find(client, wanted).await?.job_id).await?) };
        match changed.await {
            Ok(job) => jobs.push(job),
            Err(error) => code = passed_over(wanted, error)?,
        }
    }
    if wait {
        for job in &mut jobs {
            eprintln!("waiting for job {}", job.job_id);
            *job = rested(client, job).await?;
        }
    }
    let views: Vec<JobView> = jobs.iter().cloned().map(Into::into).collect();
    if !views.is_empty() || format != Format::Table {
        format.print(&views, || job_grid(&jobs).fitted())?;
    }
    Ok(code)
}

/// Says why not, unless there is no use in going on.
fn passed_over(wanted: &str, error: anyhow::Error) -> Result<ExitCode> {
    if let Some(CallError::Unreachable { .. }) = error.downcast_ref() {
        return Err(error);
    }
    eprintln!("error: {wanted}: {error:#}");
    Ok(ExitCode::FAILURE)
}

/// The job once it rests.
async fn rested(client: &Client, job: &v1::Job) -> Result<v1::Job> {
    let mut watch = Watch::start(client, job, From { event: 1, after_step: None }, PATIENCE);
    while watch.next().await?.is_some() {}
    Ok(client.job(&job.job_id).await?)
}
