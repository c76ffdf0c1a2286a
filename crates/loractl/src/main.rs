//! `loractl`: fine-tunes language models with LoRA, on this machine or on a coordinator's workers.
//!
//! The crate may use all others; no crate uses it. To read it, begin with `commands`, which has one
//! file a command, and with `local` for `loractl run`.

mod address;
mod client;
mod commands;
mod cuda;
mod doctor;
mod download;
mod exit;
#[cfg(test)]
mod fake_coordinator;
mod hub;
mod job_check;
mod job_lookup;
mod job_upload;
mod job_watch;
mod local;
mod output;
mod progress;
mod receipt;
mod stats;
mod submit;
mod token_cache;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::commands::{
    cancel, completions, convert, doctor as doctor_command, download as download_command, generate, list,
    logs, merge, pause, plan, probe, push, quickstart, resume, run, status, submit as submit_command, verify,
    watch as watch_command, worker, workers,
};

/// Fine-tune language models with LoRA
///
/// Results go to stdout, everything else to stderr.
///
/// Exit codes: 0 success, 1 error, 2 wrong usage, 3 the job failed, 4 the job was
/// cancelled or paused, 5 the coordinator cannot be reached, 130 Ctrl-C ended the
/// watching of a job.
#[derive(Debug, Parser)]
#[command(
    name = "loractl",
    version,
    verbatim_doc_comment,
    after_help = "Examples:
  loractl quickstart
  loractl run job.yaml --out runs/dates
  loractl submit job.yaml --coordinator http://coordinator:7400 --watch"
)]
struct Cli {
    /// Address of the coordinator: http://host:port or host:port
    ///
    /// Default: $LORA_COORDINATOR_ADDR, else `coordinator = ".."` in
    /// ~/.config/loractl/config.toml, else http://127.0.0.1:7400.
    #[arg(long, value_name = "URL", global = true, verbatim_doc_comment)]
    coordinator: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Local(LocalCommand),
    #[command(flatten)]
    Remote(RemoteCommand),
}

/// Commands that do not connect to a running coordinator.
#[derive(Debug, Subcommand)]
enum LocalCommand {
    Run(run::Args),
    Plan(plan::Args),
    Generate(generate::Args),
    Merge(merge::Args),
    Convert(convert::Args),
    Push(push::Args),
    Verify(verify::Args),
    Quickstart(quickstart::Args),
    Doctor(doctor_command::Args),
    Completions(completions::Args),
    #[command(hide = true)]
    Probe(probe::Args),
}

/// Commands that connect to a running coordinator.
#[derive(Debug, Subcommand)]
enum RemoteCommand {
    Submit(submit_command::Args),
    Status(status::Args),
    List(list::Args),
    Watch(watch_command::Args),
    Logs(logs::Args),
    Cancel(cancel::Args),
    Pause(pause::Args),
    Resume(resume::Args),
    Download(download_command::Args),
    Workers(workers::Args),
    #[command(hide = true)]
    Worker(worker::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // The events of a job inform the user, so only errors are logged; `RUST_LOG=info` shows
    // details.
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error")))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let ended = match (cli.command, cli.coordinator.as_deref()) {
        (Command::Remote(command), coordinator) => command.execute(coordinator),
        (Command::Local(command), None) => command.execute(),
        (Command::Local(_), Some(_)) => {
            let message = "--coordinator: this command does not connect to a coordinator; remove the flag";
            Cli::command().error(ErrorKind::ArgumentConflict, message).exit()
        }
    };
    ended.unwrap_or_else(|error| exit::from_error(&error))
}

impl LocalCommand {
    fn execute(self) -> Result<ExitCode> {
        match self {
            Self::Run(args) => run::execute(args),
            Self::Plan(args) => plan::execute(args),
            Self::Generate(args) => generate::execute(args),
            Self::Merge(args) => merge::execute(args),
            Self::Convert(args) => convert::execute(args),
            Self::Push(args) => push::execute(args),
            Self::Verify(args) => verify::execute(args),
            Self::Quickstart(args) => quickstart::execute(args),
            Self::Doctor(args) => doctor_command::execute(args),
            Self::Probe(args) => probe::execute(args),
            Self::Completions(args) => completions::execute(args, Cli::command()),
        }
    }
}

impl RemoteCommand {
    fn execute(self, coordinator: Option<&str>) -> Result<ExitCode> {
        match self {
            Self::Submit(args) => submit_command::execute(args, coordinator),
            Self::Status(args) => status::execute(args, coordinator),
            Self::List(args) => list::execute(args, coordinator),
            Self::Watch(args) => watch_command::execute(args, coordinator),
            Self::Logs(args) => logs::execute(args, coordinator),
            Self::Cancel(args) => cancel::execute(args, coordinator),
            Self::Pause(args) => pause::execute(args, coordinator),
            Self::Resume(args) => resume::execute(args, coordinator),
            Self::Download(args) => download_command::execute(args, coordinator),
            Self::Workers(args) => workers::execute(args, coordinator),
            Self::Worker(args) => worker::execute(args, coordinator),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cli_is_valid_and_every_help_has_an_example() {
        let mut cli = Cli::command();
        cli.build();
        cli.clone().debug_assert();
        for command in cli.get_subcommands_mut().filter(|command| command.get_name() != "help") {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Example"), "{}:\n{help}", command.get_name());
            assert!(help.contains(&format!("loractl {}", command.get_name())), "{help}");
        }
    }

    #[test]
    fn the_coordinator_flag_may_precede_or_follow_the_command() {
        for line in [["loractl", "--coordinator", "a:1", "list"], ["loractl", "list", "--coordinator", "a:1"]]
        {
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!(cli.coordinator.as_deref(), Some("a:1"));
            assert!(matches!(cli.command, Command::Remote(RemoteCommand::List(_))));
        }
    }

    #[test]
    fn invalid_combinations_are_usage_errors() {
        for line in [
            &["submit"][..],
            &["submit", "job.yaml", "--max-upload", "many"],
            &["submit", "job.yaml", "--priority", "101"],
            &["list", "--state", "asleep"],
            &["cancel"],
            &["resume", "j", "--workers", "4..2"],
            &["logs", "j", "--from", "0"],
            &["run", "job.yaml", "--out", "out", "--device", "gpu"],
            &["doctor", "--timeout", "0"],
            &["probe", "libc.so.6"],
            &["completions", "tcsh"],
        ] {
            let error = Cli::try_parse_from(["loractl"].iter().chain(line)).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line:?}");
        }
        assert!(Cli::try_parse_from(["loractl", "submit", "job.yaml", "--priority", "-100"]).is_ok());
    }
}
