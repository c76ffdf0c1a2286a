//! How a run begins: with a new job, or with the one that its directory holds.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use lora_proto::v1;
use lora_spec::{FieldError, JobFile, JobSpec, JobState};
use tokio::time::timeout;

use crate::client::{CallError, Client};
use crate::inputs::JobFiles;
use crate::job_lookup;
use crate::job_watch::{JobWatch, WatchStart};
use crate::progress::ProgressDisplay;
use crate::submit::{SubmitOptions, submit};

/// The key of the one job that a run has.
const IDEMPOTENCY_KEY: &str = "run";
/// How long a job without workers may take to rest; longer than their lease.
const REST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the embedded coordinator may be silent.
const WAIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Submits the job of `file`.
pub(crate) async fn submit_new(client: &Client, file: &JobFile, inputs: &JobFiles) -> Result<v1::Job> {
    submit(client, file, inputs, &SubmitOptions { idempotency_key: IDEMPOTENCY_KEY.into(), priority: 0 })
        .await
}

/// The job of an unfinished run, on its way again if it rested. It must be that of `file`.
pub(crate) async fn resume(
    client: &Client,
    file: &JobFile,
    inputs: &JobFiles,
    progress: &ProgressDisplay,
) -> Result<v1::Job> {
    let Some(job) = job_lookup::list(client, &[], Some(1)).await?.pop() else {
        // The run ended before it had submitted its job.
        return submit_new(client, file, inputs).await;
    };
    let earlier = JobSpec::try_from(job.spec.clone().context("the stored job has no settings")?)
        .context("the stored job is of a newer version")?;
    if let Some(difference) = file.job.difference(&earlier) {
        bail!("the unfinished run has another job: {}", file.locate(difference));
    }
    if let Some(setting) = inputs.difference(&job.inputs.clone().unwrap_or_default()) {
        let message =
            "has other contents than when the run was started; restore them, or start a new run".into();
        return Err(file.locate(FieldError::new(setting, message)).into());
    }
    let job = wait_until_resumable(client, job, file, &earlier, progress).await?;
    match JobState::from_name(&job.state) {
        Some(JobState::Paused | JobState::Failed) => {}
        Some(JobState::Cancelled) => {
            bail!("the unfinished run was cancelled; choose another output directory")
        }
        _ => return Ok(job),
    }
    let workers = v1::JobSpec::try_from(&file.job)?.workers;
    let request = v1::ResumeJobRequest { job_id: job.job_id, workers };
    Ok(client.call(client.jobs().resume_job(request)).await?)
}

/// The job as it is, if it can go on so. One that waits for another number of workers is brought to rest first, and so
/// is one that was about to rest.
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
    if state.is_some_and(JobState::is_at_rest) || (fits && !stopping) {
        return Ok(job);
    }
    progress.say("waiting until the earlier workers are known to be gone");
    if !stopping {
        pause(client, &job.job_id).await?;
    }
    let mut watch = JobWatch::start(client, &job, WatchStart { event: 1, after_step: None }, WAIT_TIMEOUT);
    let rest = async {
        while watch.next().await?.is_some() {}
        Ok::<_, CallError>(())
    };
    timeout(REST_TIMEOUT, rest).await.context("the unfinished run does not come to rest")??;
    Ok(client.job(&job.job_id).await?)
}

/// Asks for a pause; a job that rests already is no error.
pub(crate) async fn pause(client: &Client, job_id: &str) -> Result<()> {
    let request = v1::PauseJobRequest { job_id: job_id.to_owned() };
    match client.call(client.jobs().pause_job(request)).await {
        Ok(_) => Ok(()),
        // It has just ended by itself.
        Err(CallError::Refused(status)) if status.code() == tonic::Code::FailedPrecondition => Ok(()),
        Err(error) => Err(error.into()),
    }
}
