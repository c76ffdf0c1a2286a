//! The start of a run: with a new job, or with the unfinished job in the output directory.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use lora_proto::v1;
use lora_spec::{JobFile, JobSpec, JobState};
use tokio::time::timeout;

use crate::client::{CallError, Client};
use crate::job_lookup;
use crate::job_upload::JobUpload;
use crate::job_watch::{JobWatch, WatchStart};
use crate::progress::ProgressDisplay;
use crate::submit::{SubmitOptions, submit};

/// The idempotency key of the only job of a run.
const IDEMPOTENCY_KEY: &str = "run";
/// Time limit for a job without workers to stop; longer than the lease of workers.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// How long to wait for the embedded coordinator if it is unreachable.
const WAIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Submits the job of `file`.
pub(crate) async fn submit_new(client: &Client, file: &JobFile, inputs: &JobUpload) -> Result<v1::Job> {
    submit(client, file, inputs, &SubmitOptions { idempotency_key: IDEMPOTENCY_KEY.into(), priority: 0 })
        .await
}

/// Returns the job of an unfinished run, and resumes it if it has stopped.
///
/// # Errors
/// The job differs from that of `file`, or it cannot be resumed.
pub(crate) async fn resume(
    client: &Client,
    file: &JobFile,
    inputs: &JobUpload,
    progress: &ProgressDisplay,
) -> Result<v1::Job> {
    let Some(job) = job_lookup::list(client, &[], Some(1)).await?.pop() else {
        // The run ended before it had submitted its job.
        return submit_new(client, file, inputs).await;
    };
    let earlier = JobSpec::try_from(job.spec.clone().context("the stored job has no settings")?)
        .context("the stored job is from a newer version of loractl")?;
    if let Some(difference) = file.job.difference(&earlier) {
        bail!("the unfinished run was started with another job: {}", file.locate(difference));
    }
    inputs
        .check_unchanged(&job.inputs.clone().unwrap_or_default())
        .map_err(|changed| file.locate(changed))?;
    let job = wait_until_resumable(client, job, file, &earlier, progress).await?;
    match JobState::from_name(&job.state) {
        Some(JobState::Paused | JobState::Failed) => {}
        Some(JobState::Cancelled) => {
            bail!("the unfinished run was cancelled; choose another output directory")
        }
        _ => return Ok(job),
    }
    let workers = (&file.job.workers).into();
    let request = v1::ResumeJobRequest { job_id: job.job_id, workers: Some(workers) };
    Ok(client.call(client.jobs().resume_job(request)).await?)
}

/// Returns the job once it can continue or be resumed. A job that was started with another number
/// of workers, or that is about to stop, must stop first.
async fn wait_until_resumable(
    client: &Client,
    job: v1::Job,
    file: &JobFile,
    earlier: &JobSpec,
    progress: &ProgressDisplay,
) -> Result<v1::Job> {
    let state = JobState::from_name(&job.state);
    let stopping = matches!(state, Some(JobState::Pausing | JobState::Cancelling));
    let fits = file.job.workers == earlier.workers;
    if state.is_some_and(JobState::is_stopped) || (fits && !stopping) {
        return Ok(job);
    }
    progress.say("waiting until the job of the earlier run has stopped");
    if !stopping {
        pause(client, &job.job_id).await?;
    }
    let mut watch = JobWatch::start(client, &job, WatchStart { event: 1, after_step: None }, WAIT_TIMEOUT);
    let stopped = async {
        while watch.next().await?.is_some() {}
        Ok::<_, CallError>(())
    };
    timeout(STOP_TIMEOUT, stopped).await.context("the unfinished run did not stop in time")??;
    Ok(client.job(&job.job_id).await?)
}

/// Pauses the job. A job that has already stopped is not an error.
pub(crate) async fn pause(client: &Client, job_id: &str) -> Result<()> {
    let request = v1::PauseJobRequest { job_id: job_id.to_owned() };
    match client.call(client.jobs().pause_job(request)).await {
        Ok(_) => Ok(()),
        // The job has just stopped by itself.
        Err(CallError::Refused(status)) if status.code() == tonic::Code::FailedPrecondition => Ok(()),
        Err(error) => Err(error.into()),
    }
}
