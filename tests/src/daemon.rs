//! A daemon under test, whose log has the addresses that it listens on.

use std::process::Command;

use serde_json::Value;

use crate::http::{self, HttpResponse};
use crate::process::{Finished, Running, Signal, wait_until};

/// A daemon that listens and logs as JSON. Dropping this kills the daemon.
#[derive(Debug)]
pub struct Daemon {
    running: Running,
    listening: Value,
}

impl Daemon {
    /// Starts `command`, which logs as JSON, and waits until it listens.
    pub fn start(command: &mut Command) -> Self {
        let mut running = Running::start(command);
        let listening = wait_until("the log entry `listening`", &mut running, |running| {
            entries(running).find(|fields| fields["message"] == "listening")
        });
        Self { running, listening }
    }

    /// Returns a field of the log entry `listening`, such as `http`.
    pub fn address(&self, field: &str) -> &str {
        self.listening[field].as_str().unwrap_or_else(|| panic!("{field} in {}", self.listening))
    }

    /// Gets `path` from its HTTP server.
    pub fn get(&self, path: &str) -> HttpResponse {
        http::get(self.address("http"), path)
    }

    /// Returns the value of a metric; `None` if the metric does not exist. `name` includes the
    /// labels.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let answer = self.get("/metrics");
        let value = answer.body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map(|value| value.parse().unwrap())
    }

    /// Returns the fields of the log entries so far.
    pub fn log(&self) -> Vec<Value> {
        entries(&self.running).collect()
    }

    /// Returns whether the daemon has exited.
    pub fn has_ended(&mut self) -> bool {
        self.running.has_ended()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        self.running.process.signal(signal);
    }

    /// Kills the daemon and waits for its exit.
    pub fn kill(self) {
        self.signal(Signal::KILL);
        self.running.wait();
    }

    /// Sends SIGTERM and waits for the exit.
    pub fn terminate(self) -> Finished {
        self.signal(Signal::TERM);
        self.running.wait()
    }
}

/// Returns the fields of the JSON lines of a log. Other lines, such as the message of a panic, are
/// skipped; they are printed when a test fails.
fn entries(running: &Running) -> impl Iterator<Item = Value> {
    let log = running.stderr();
    let fields = |line: &str| Some(serde_json::from_str::<Value>(line).ok()?["fields"].take());
    log.lines().filter_map(fields).collect::<Vec<_>>().into_iter()
}
