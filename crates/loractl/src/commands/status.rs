//! `loractl status`: shows the status of a job.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use lora_proto::v1;
use lora_spec::JobState;
use tokio::time::timeout;

use super::online;
use crate::client::Client;
use crate::job_lookup;
use crate::job_watch::{JobWatch, WatchStart};
use crate::output::{Format, JobView, job_table};
use crate::stats::JobStats;

/// Number of finished steps to compute the speed from.
const PACE_STEPS: u64 = 20;
/// How long to wait for these steps.
const PACE_TIMEOUT: Duration = Duration::from_secs(3);

/// Show the status of a job
///
/// The status has the state of the job and what it waits for, its progress and speed,
/// its workers, its newest checkpoint, the cause of a failure, and the files of the
/// result.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl status 3f2a
  loractl status 3f2a -o json | jq -r .state"
)]
pub(crate) struct Args {
    /// Job id, or a unique prefix of it.
    #[arg(value_name = "JOB")]
    job: String,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let job = job_lookup::find(&client, &args.job).await?;
        let (rate, left) = match JobState::from_name(&job.state) {
            Some(JobState::Running) => pace(&client, &job).await,
            _ => (None, None),
        };
        let view = JobView::new(job.clone(), rate, left);
        args.output.print(&view, || job_table(&job, rate, left).to_string())?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Tokens per second and seconds left, computed from the newest steps. Errors give `None`, because
/// the status is useful without these values.
async fn pace(client: &Client, job: &v1::Job) -> (Option<f64>, Option<f64>) {
    let newest = job.metrics.map_or(0, |metrics| metrics.step);
    // No event has this number, so the stream has only steps.
    let from = WatchStart { event: u64::MAX, after_step: Some(newest.saturating_sub(PACE_STEPS)) };
    let mut watch = JobWatch::start(client, job, from, PACE_TIMEOUT);
    let mut stats = JobStats::from_job(&v1::Job { completed_steps: 0, ..job.clone() });
    let read = async {
        while stats.completed_steps() < newest {
            match watch.next().await {
                Ok(Some(item)) => stats.update(&item),
                Ok(None) | Err(_) => return,
            }
        }
    };
    // After the time limit, the steps received so far are used.
    let _ = timeout(PACE_TIMEOUT, read).await;
    (stats.tokens_per_second(), stats.seconds_left())
}

#[cfg(test)]
mod tests {
    use lora_proto::v1::watch_job_response::Kind;
    use prost_types::Timestamp;

    use super::*;
    use crate::fake_coordinator::{FakeCoordinator, StreamEnd};

    #[tokio::test]
    async fn the_pace_is_computed_from_the_newest_steps() {
        let step = |step: u64| {
            let metrics = v1::StepMetrics { step, num_tokens: 100 * step, ..v1::StepMetrics::default() };
            let time = Some(Timestamp { seconds: 1000 + 2 * step as i64, nanos: 0 });
            Kind::Step(v1::StepReport { metrics: Some(metrics), time, ..v1::StepReport::default() })
        };
        let job = v1::Job {
            job_id: "j".into(),
            state: "running".into(),
            completed_steps: 40,
            facts: Some(v1::RunFacts { total_steps: 50, ..v1::RunFacts::default() }),
            metrics: Some(v1::StepMetrics { step: 40, ..v1::StepMetrics::default() }),
            ..v1::Job::default()
        };
        let fake = FakeCoordinator::serve(vec![job.clone()]).await;
        fake.log((1..=40).map(step).collect());
        // The job is still running, so the stream does not end.
        fake.streams(vec![(usize::MAX, StreamEnd::Hang)]);
        let pace = pace(&fake.client().await, &job).await;
        assert_eq!(pace, (Some(50.0), Some(20.0)));
        assert_eq!(fake.watched()[0].after_step, 20);
    }
}
