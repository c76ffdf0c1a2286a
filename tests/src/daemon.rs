//! A daemon under test, which tells by its log where it listens.

use std::process::Command;

use serde_json::Value;

use crate::http::{self, HttpResponse};
use crate::process::{Finished, Running, Signal, wait_until};

/// A daemon that listens, with its log as JSON. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    running: Running,
    listening: Value,
}

impl Daemon {
    /// Starts `command`, which logs as JSON, and waits until it listens.
    pub fn start(command: &mut Command) -> Self {
        let mut running = Running::start(command);
        let listening = wait_until("the word that it listens", &mut running, |running| {
            entries(running).find(|fields| fields["message"] == "listening")
        });
        Self { running, listening }
    }

    /// A field of what it says when it listens, such as `http`.
    pub fn address(&self, field: &str) -> &str {
        self.listening[field].as_str().unwrap_or_else(|| panic!("{field} in {}", self.listening))
    }

    /// What it answers over HTTP.
    pub fn get(&self, path: &str) -> HttpResponse {
        http::get(self.address("http"), path)
    }

    /// The value of a metric, named with its labels; none if there is no such one.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let answer = self.get("/metrics");
        let value = answer.body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map(|value| value.parse().unwrap())
    }

    /// Fields of what it has logged so far.
    pub fn log(&self) -> Vec<Value> {
        entries(&self.running).collect()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.running.has_ended()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        self.running.process.signal(signal);
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(self) {
        self.signal(Signal::KILL);
        self.running.wait();
    }

    /// Asks it to end, and waits until it has.
    pub fn terminate(self) -> Finished {
        self.signal(Signal::TERM);
        self.running.wait()
    }
}

/// The whole lines of a log. What is no JSON, such as the message of a panic, is shown when a test fails.
fn entries(running: &Running) -> impl Iterator<Item = Value> {
    let log = running.stderr();
    let fields = |line: &str| Some(serde_json::from_str::<Value>(line).ok()?["fields"].take());
    log.lines().filter_map(fields).collect::<Vec<_>>().into_iter()
}
