//! `loractl watch`: watches a job until it stops.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use backon::Retryable;
use lora_proto::v1;

use super::online;
use crate::client::{CallError, Client, MAX_RETRIES, delays};
use crate::exit;
use crate::job_lookup;
use crate::job_watch::{JobWatch, WatchItem, WatchStart};
use crate::output::{Format, Item, JobView, failure_text, job_table};
use crate::progress::{EventTimes, ProgressDisplay};
use crate::stats::JobStats;

/// Default time to wait for an unreachable coordinator, in seconds.
const WAIT_SECONDS: u64 = 300;
/// Number of finished steps to compute the speed from when watching begins.
const PACE_STEPS: u64 = 50;

/// Watch a job until it stops
///
/// Events and a progress bar are shown on stderr (as lines if stderr is not a
/// terminal), and the final status is printed to stdout. With -o json, every event
/// and step from the first one on is printed to stdout as one line of JSON.
///
/// If the connection to the coordinator is lost, the command reconnects, and nothing
/// is missed. Ctrl-C stops watching; the job continues.
///
/// Exit codes: 0 the job succeeded, 3 it failed, 4 it was cancelled or paused, 5 the
/// coordinator could not be reached again, 130 Ctrl-C.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl watch 3f2a
  loractl watch 3f2a && loractl download 3f2a
  loractl watch 3f2a -o json | jq 'select(.type == \"step\") | .loss'"
)]
pub(crate) struct Args {
    /// Job id, or a unique prefix of it.
    #[arg(value_name = "JOB")]
    job: String,
    /// Seconds to wait for an unreachable coordinator.
    #[arg(long, value_name = "S", default_value_t = WAIT_SECONDS)]
    reconnect_seconds: u64,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// How a job is watched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WatchOptions {
    format: Format,
    /// How long to wait for an unreachable coordinator.
    patience: Duration,
}

impl WatchOptions {
    /// Options with the default time to wait.
    pub(crate) fn new(format: Format) -> Self {
        Self { format, patience: Duration::from_secs(WAIT_SECONDS) }
    }
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let job = job_lookup::find(&client, &args.job).await?;
        let options =
            WatchOptions { format: args.output, patience: Duration::from_secs(args.reconnect_seconds) };
        to_the_end(&client, job, options).await
    })
}

/// Watches `job` until it stops or the user presses Ctrl-C. Returns the exit code.
pub(crate) async fn to_the_end(client: &Client, job: v1::Job, options: WatchOptions) -> Result<ExitCode> {
    let after_step = match options.format {
        Format::Table => job.completed_steps.saturating_sub(PACE_STEPS),
        Format::Json | Format::Yaml => 0,
    };
    let from = WatchStart { event: 1, after_step: Some(after_step) };
    let mut watch = JobWatch::start(client, &job, from, options.patience);
    let mut printer = WatchPrinter::new(&job, options.format);
    let interrupt = tokio::signal::ctrl_c();
    let mut interrupt = std::pin::pin!(interrupt);
    loop {
        tokio::select! {
            item = watch.next() => match item {
                Ok(Some(item)) => printer.take(item)?,
                Ok(None) => break,
                Err(error) => {
                    printer.progress.finish();
                    return Err(error.into());
                }
            },
            pressed = &mut interrupt => {
                printer.progress.finish();
                pressed?;
                eprintln!("no longer watching; job {} continues", job.job_id);
                return Ok(exit::interrupted());
            }
        }
    }
    printer.progress.finish();
    let get_job = || client.job(&job.job_id);
    let is_unreachable = |error: &CallError| matches!(error, CallError::Unreachable { .. });
    let job = get_job.retry(delays().with_max_times(MAX_RETRIES)).when(is_unreachable).await?;
    print_job(options.format, job.clone().into(), || job_table(&job, None, None).to_string())?;
    print_next_commands(&job);
    Ok(exit::from_state(&job.state))
}

/// Writes a job to the same output as its events and steps.
pub(crate) fn print_job(format: Format, job: JobView, table: impl FnOnce() -> String) -> Result<()> {
    format.print_next(&Item::Job(Box::new(job)), table)
}

/// Prints the command that a user may run next for a stopped job, or the cause of its failure.
fn print_next_commands(job: &v1::Job) {
    let id = &job.job_id;
    match (job.state.as_str(), &job.failure) {
        ("succeeded", _) => eprintln!("download the result with: loractl download {id}"),
        ("paused", _) => eprintln!("continue the job with: loractl resume {id}"),
        (_, Some(failure)) => eprintln!("error: the job failed: {}", failure_text(failure)),
        _ => {}
    }
}

/// Shows the items of a watched job in the chosen format.
struct WatchPrinter {
    format: Format,
    progress: ProgressDisplay,
    stats: JobStats,
}

impl WatchPrinter {
    fn new(job: &v1::Job, format: Format) -> Self {
        Self { format, progress: ProgressDisplay::new(EventTimes::Shown), stats: JobStats::from_job(job) }
    }

    fn take(&mut self, item: WatchItem) -> Result<()> {
        if self.format == Format::Table {
            self.stats.update(&item);
            self.progress.show(&item, &self.stats);
            return Ok(());
        }
        let item = match item {
            WatchItem::Event(event) => Item::Event(event.into()),
            WatchItem::Step(step) => Item::Step(step.into()),
            WatchItem::Note(note) => {
                eprintln!("{note}");
                return Ok(());
            }
        };
        self.format.print_next(&item, String::new)
    }
}
