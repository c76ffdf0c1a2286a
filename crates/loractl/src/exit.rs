//! Exit codes.

use std::io;
use std::process::ExitCode;

use lora_daemon::program::error_chain;
use lora_spec::JobState;

use crate::client::CallError;

const JOB_FAILED: u8 = 3;
const JOB_STOPPED: u8 = 4;
const UNREACHABLE: u8 = 5;
const INTERRUPTED: u8 = 130;

/// Returns the exit code for a job that was watched until it stopped in `state`.
pub(crate) fn from_state(state: &str) -> ExitCode {
    match JobState::from_name(state) {
        Some(JobState::Succeeded) => ExitCode::SUCCESS,
        Some(JobState::Failed) => ExitCode::from(JOB_FAILED),
        _ => ExitCode::from(JOB_STOPPED),
    }
}

/// Returns the exit code after Ctrl-C, which is the one that shells use.
pub(crate) fn interrupted() -> ExitCode {
    ExitCode::from(INTERRUPTED)
}

/// Prints an error and returns its exit code.
pub(crate) fn from_error(error: &anyhow::Error) -> ExitCode {
    let is_closed = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(is_closed) {
        // The reader of stdout, such as `head`, has closed the pipe because it needs no more.
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {}", error_chain(error.as_ref()));
    match error.downcast_ref() {
        Some(CallError::Unreachable { .. }) => ExitCode::from(UNREACHABLE),
        _ => ExitCode::FAILURE,
    }
}
