//! `loractl watch`: a job to its end.

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

/// How long a coordinator that is away is waited for, where nothing else is asked for.
const WAIT_SECONDS: u64 = 300;
/// Finished steps that the pace is taken from when watching begins.
const PACE_STEPS: u64 = 50;

/// Watch a job to its end.
///
/// Shows its events and a progress bar on stderr (lines where that is no terminal) and at the end its status on stdout;
/// with -o json, each event and step as a line of JSON on stdout, from the first one on. A coordinator that goes away is
/// waited for, and nothing is missed. Ctrl-C ends the watching (exit code 130), not the job. Exit codes: 0 the job
/// succeeded, 3 it failed, 4 it was cancelled or paused, 5 the coordinator stayed away.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  loractl watch 3f2a
  loractl watch 3f2a && loractl download 3f2a
  loractl watch 3f2a -o json | jq 'select(.type == \"step\") | .loss'")]
pub(crate) struct Args {
    /// The job's id, or as much of its start as no other has.
    #[arg(value_name = "JOB")]
    job: String,
    /// How long a coordinator that is away is waited for.
    #[arg(long, value_name = "S", default_value_t = WAIT_SECONDS)]
    reconnect_seconds: u64,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// How a job is watched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WatchOptions {
    format: Format,
    patience: Duration,
}

impl WatchOptions {
    /// As where nothing else is asked for.
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

/// Watches `job` until it rests, or Ctrl-C.
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
                eprintln!("no longer watching; job {} goes on", job.job_id);
                return Ok(exit::interrupted());
            }
        }
    }
    printer.progress.finish();
    let look = || client.job(&job.job_id);
    let again = |error: &CallError| matches!(error, CallError::Unreachable { .. });
    let job = look.retry(delays().with_max_times(MAX_RETRIES)).when(again).await?;
    print_job(options.format, job.clone().into(), || job_table(&job, None, None).to_string())?;
    print_next_commands(&job);
    Ok(exit::from_state(&job.state))
}

/// Writes a job beside its events and steps.
pub(crate) fn print_job(format: Format, job: JobView, table: impl FnOnce() -> String) -> Result<()> {
    format.print_next(&Item::Job(Box::new(job)), table)
}

/// What people can do with a job that rests.
fn print_next_commands(job: &v1::Job) {
    let id = &job.job_id;
    match (job.state.as_str(), &job.failure) {
        ("succeeded", _) => eprintln!("fetch the result with: loractl download {id}"),
        ("paused", _) => eprintln!("go on with it with: loractl resume {id}"),
        (_, Some(failure)) => eprintln!("error: the job failed: {}", failure_text(failure)),
        _ => {}
    }
}

/// What was seen, as it is shown.
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
