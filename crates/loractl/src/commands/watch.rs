//! `loractl watch`: a job to its end.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use backon::Retryable;
use lora_proto::v1;

use super::online;
use crate::client::{CallError, Client, RETRIES, delays};
use crate::exit;
use crate::jobs;
use crate::output::{Format, Item, JobView, failure_text, job_table};
use crate::progress::{Progress, Times};
use crate::tally::Tally;
use crate::watch::{From, Seen, Watch};

/// How long a coordinator that is away is waited for, where nothing else is asked for.
const PATIENCE: u64 = 300;
/// Finished steps that the pace is taken from when watching begins.
const STEPS_BEFORE: u64 = 50;

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
    #[arg(long, value_name = "S", default_value_t = PATIENCE)]
    reconnect_seconds: u64,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// How a job is watched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manner {
    format: Format,
    patience: Duration,
}

impl Manner {
    /// As where nothing else is asked for.
    pub(crate) fn new(format: Format) -> Self {
        Self { format, patience: Duration::from_secs(PATIENCE) }
    }
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let job = jobs::find(&client, &args.job).await?;
        let manner = Manner { format: args.output, patience: Duration::from_secs(args.reconnect_seconds) };
        to_the_end(&client, job, manner).await
    })
}

/// Watches `job` until it rests, or Ctrl-C.
pub(crate) async fn to_the_end(client: &Client, job: v1::Job, manner: Manner) -> Result<ExitCode> {
    let after_step = match manner.format {
        Format::Table => job.completed_steps.saturating_sub(STEPS_BEFORE),
        Format::Json | Format::Yaml => 0,
    };
    let from = From { event: 1, after_step: Some(after_step) };
    let mut watch = Watch::start(client, &job, from, manner.patience);
    let mut shown = Shown::new(&job, manner.format);
    let interrupt = tokio::signal::ctrl_c();
    let mut interrupt = std::pin::pin!(interrupt);
    loop {
        tokio::select! {
            seen = watch.next() => match seen {
                Ok(Some(seen)) => shown.take(seen)?,
                Ok(None) => break,
                Err(error) => {
                    shown.progress.finish();
                    return Err(error.into());
                }
            },
            pressed = &mut interrupt => {
                shown.progress.finish();
                pressed?;
                eprintln!("no longer watching; job {} goes on", job.job_id);
                return Ok(exit::interrupted());
            }
        }
    }
    shown.progress.finish();
    let look = || client.job(&job.job_id);
    let again = |error: &CallError| matches!(error, CallError::Unreachable { .. });
    let job = look.retry(delays().with_max_times(RETRIES)).when(again).await?;
    print_job(manner.format, job.clone().into(), || job_table(&job, None, None).to_string())?;
    say_what_next(&job);
    Ok(exit::of_job(&job.state))
}

/// Writes a job beside its events and steps.
pub(crate) fn print_job(format: Format, job: JobView, table: impl FnOnce() -> String) -> Result<()> {
    format.print_next(&Item::Job(Box::new(job)), table)
}

/// What people can do with a job that rests.
fn say_what_next(job: &v1::Job) {
    let id = &job.job_id;
    match (job.state.as_str(), &job.failure) {
        ("succeeded", _) => eprintln!("fetch the result with: loractl download {id}"),
        ("paused", _) => eprintln!("go on with it with: loractl resume {id}"),
        (_, Some(failure)) => eprintln!("error: the job failed: {}", failure_text(failure)),
        _ => {}
    }
}

/// What was seen, as it is shown.
struct Shown {
    format: Format,
    progress: Progress,
    tally: Tally,
}

impl Shown {
    fn new(job: &v1::Job, format: Format) -> Self {
        Self { format, progress: Progress::new(Times::Shown), tally: Tally::of(job) }
    }

    fn take(&mut self, seen: Seen) -> Result<()> {
        if self.format == Format::Table {
            self.tally.take(&seen);
            self.progress.show(&seen, &self.tally);
            return Ok(());
        }
        let item = match seen {
            Seen::Event(event) => Item::Event(event.into()),
            Seen::Step(step) => Item::Step(step.into()),
            Seen::Note(note) => {
                eprintln!("{note}");
                return Ok(());
            }
        };
        self.format.print_next(&item, String::new)
    }
}
