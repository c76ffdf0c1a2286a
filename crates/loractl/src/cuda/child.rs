//! Child processes that answer in JSON, and may hang or crash.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::process::Command;
use tokio::time::timeout;

/// The reason why there is no answer. The texts follow the name of a program or library.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChildError {
    /// The process cannot be started.
    #[error("cannot be started: {0}")]
    Start(#[source] io::Error),
    /// The process took too long and was killed.
    #[error("hangs: no answer within {} s", .0.as_secs_f64())]
    TimedOut(Duration),
    /// A signal ended the process.
    #[error("crashes (signal {signal}){}", with_colon(.said))]
    Crashed {
        /// Number of the signal.
        signal: i32,
        /// The last error line, or the last line, that the process wrote to stderr.
        said: String,
    },
    /// The process failed with this message.
    #[error("{0}")]
    Failed(String),
    /// The process wrote no valid answer to stdout.
    #[error("gives an invalid answer: {0}")]
    InvalidOutput(String),
}

/// Runs `command` and returns the last line of its stdout that is JSON of this type. After `limit`
/// the process is killed.
pub(crate) async fn answer<T: DeserializeOwned>(
    command: &mut Command,
    limit: Duration,
) -> Result<T, ChildError> {
    let text = stdout(command, limit).await?;
    // Libraries write to stdout too, some of them as the process exits.
    if let Some(answer) = text.lines().rev().find_map(|line| serde_json::from_str(line).ok()) {
        return Ok(answer);
    }
    let text = last(&text);
    serde_json::from_str(text).map_err(|error| ChildError::InvalidOutput(format!("{error}: {text:?}")))
}

/// Runs `command` and returns its stdout. After `limit` the process is killed.
pub(super) async fn stdout(command: &mut Command, limit: Duration) -> Result<String, ChildError> {
    let running = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let ended = timeout(limit, running).await.map_err(|_| ChildError::TimedOut(limit))?;
    let Output { status, stdout, stderr } = ended.map_err(ChildError::Start)?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    Err(failure(status, &String::from_utf8_lossy(&stderr)))
}

fn failure(status: ExitStatus, stderr: &str) -> ChildError {
    let error = stderr.lines().rev().find_map(|line| line.strip_prefix("error: "));
    let said = error.unwrap_or_else(|| last(stderr)).to_owned();
    match status.signal() {
        Some(signal) => ChildError::Crashed { signal, said },
        None if said.is_empty() => ChildError::Failed(format!("ends with {status}")),
        None => ChildError::Failed(said),
    }
}

/// Returns the last line of `text`.
pub(super) fn last(text: &str) -> &str {
    text.trim_end().rsplit('\n').next().unwrap_or_default().trim_end()
}

fn with_colon(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(": {said}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(script: &str, limit: Duration) -> Result<u32, String> {
        answer(Command::new("sh").args(["-c", script]), limit).await.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn every_child_outcome_gives_an_answer_or_an_error() {
        let enough = Duration::from_secs(20);
        assert_eq!(ask("echo a library greets; echo 7", enough).await, Ok(7));
        assert_eq!(ask("echo 6; echo 7; echo a library says goodbye", enough).await, Ok(7));
        let error = |answer: Result<u32, String>| answer.unwrap_err();
        assert_eq!(error(ask("echo error: it is not there >&2; exit 1", enough).await), "it is not there");
        assert_eq!(error(ask("exit 3", enough).await), "ends with exit status: 3");
        let goodbye = "echo error: 1 >&2; echo error: it is not there >&2; echo goodbye >&2; exit 1";
        assert_eq!(error(ask(goodbye, enough).await), "it is not there");
        assert_eq!(error(ask("echo help >&2; kill -SEGV $$", enough).await), "crashes (signal 11): help");
        assert!(error(ask("echo seven", enough).await).starts_with("gives an invalid answer"));
        let error = ask("exec sleep 1000", Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error, "hangs: no answer within 0.02 s");
    }
}
