//! `loractl logs`: prints the events of a job.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use super::online;
use crate::job_lookup;
use crate::job_watch::{JobWatch, WatchItem, WatchStart};
use crate::output::{EventView, Format, event_text, format_time, line};

/// How long to wait for an unreachable coordinator.
const WAIT_TIMEOUT: Duration = Duration::from_secs(300);

/// Print the events of a job with their times
///
/// Steps are not included; `loractl watch JOB -o json` prints events and steps.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl logs 3f2a
  loractl logs 3f2a --follow
  loractl logs 3f2a --from 12 -o json"
)]
pub(crate) struct Args {
    /// Job id, or a unique prefix of it.
    #[arg(value_name = "JOB")]
    job: String,
    /// Keep printing new events until the job stops.
    #[arg(short, long)]
    follow: bool,
    /// Number of the first event to print.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    from: u64,
    /// Output format; json prints one event per line.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    online(coordinator, async |client| {
        let job = job_lookup::find(&client, &args.job).await?;
        let from = WatchStart { event: args.from, after_step: None };
        let is_last = |number: u64| !args.follow && number >= job.last_event;
        if is_last(args.from - 1) {
            return Ok(ExitCode::SUCCESS);
        }
        let mut watch = JobWatch::start(&client, &job, from, WAIT_TIMEOUT);
        loop {
            match watch.next().await? {
                Some(WatchItem::Event(event)) => {
                    let number = event.number;
                    let text = || format!("{}  {}", format_time(event.time.as_ref()), event_text(&event));
                    match args.output {
                        Format::Table => line(&text())?,
                        format => format.print_next(&EventView::from(event), String::new)?,
                    }
                    if is_last(number) {
                        return Ok(ExitCode::SUCCESS);
                    }
                }
                Some(WatchItem::Note(note)) => eprintln!("{note}"),
                Some(WatchItem::Step(_)) => {}
                None => return Ok(ExitCode::SUCCESS),
            }
        }
    })
}
