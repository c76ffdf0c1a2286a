//! Processes that are started, watched, signalled and waited for; every wait has a limit.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde_json::Value;

pub use rustix::process::Signal;

/// How long anything is waited for; far more than it takes.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(180);
/// Lines of a process's log that a failed test shows.
const MAX_SHOWN_LINES: usize = 60;

/// A process, held by a descriptor, so that its id cannot come to mean another.
#[derive(Debug)]
pub struct Process {
    /// Its command line.
    pub arguments: Vec<String>,
    descriptor: OwnedFd,
}

impl Process {
    fn open(pid: Pid) -> Option<Self> {
        let descriptor = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let line = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_pid())).ok()?;
        let words = line.split(|byte| *byte == 0);
        Some(Self {
            arguments: words.map(|word| String::from_utf8_lossy(word).into_owned()).collect(),
            descriptor,
        })
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.descriptor, signal).unwrap();
    }

    /// Waits until it has ended; false: it did not within [`WAIT_TIMEOUT`].
    pub fn wait(&self) -> bool {
        let limit = Timespec::try_from(WAIT_TIMEOUT).unwrap();
        poll(&mut [PollFd::new(&self.descriptor, PollFlags::IN)], Some(&limit)).unwrap() > 0
    }
}

/// A process that a test has started. Dropping it kills it; a test that fails shows the end of what it wrote to stderr.
#[derive(Debug)]
pub struct Running {
    /// Its handle.
    pub process: Process,
    child: Child,
    stdout: File,
    stderr: File,
}

/// How a process ended.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; none: it was killed by a signal.
    pub code: Option<i32>,
    /// All of its stdout.
    pub stdout: String,
    /// All of its stderr.
    pub stderr: String,
}

impl Running {
    /// Starts `command`. Its stdin stays open as long as this lives.
    pub fn start(command: &mut Command) -> Self {
        let (stdout, stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        command.stdin(Stdio::piped()).stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
        let child = command.spawn().unwrap();
        let process = Process::open(Pid::from_child(&child)).unwrap();
        Self { process, child, stdout, stderr }
    }

    /// The processes that it has started and that still run.
    pub fn children(&self) -> Vec<Process> {
        let parent = self.child.id().to_string();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| parent_of(*pid).as_ref() == Some(&parent))
            .filter_map(|pid| Process::open(Pid::from_raw(pid)?))
            .collect()
    }

    /// What it has written to stdout so far.
    pub fn stdout(&self) -> String {
        text(&self.stdout)
    }

    /// What it has written to stderr so far.
    pub fn stderr(&self) -> String {
        text(&self.stderr)
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end; fails if that does not come within [`WAIT_TIMEOUT`].
    pub fn wait(mut self) -> Finished {
        if !self.process.wait() {
            panic!("{:?} runs on after {WAIT_TIMEOUT:?}; stderr:\n{}", self.process.arguments, self.stderr());
        }
        let code = self.child.wait().unwrap().code();
        Finished { code, stdout: text(&self.stdout), stderr: text(&self.stderr) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let stderr = self.stderr();
            let shown = stderr.lines().count().saturating_sub(MAX_SHOWN_LINES);
            let tail: Vec<&str> = stderr.lines().skip(shown).collect();
            eprintln!("--- stderr of {}\n{}\n---", self.process.arguments.join(" "), tail.join("\n"));
        }
        // One that has ended needs neither.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// Runs `command` to its end.
    pub fn run(command: &mut Command) -> Self {
        Running::start(command).wait()
    }

    /// Itself, if the exit code is `code`.
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Its stdout as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// What the one line of stderr that starts with `error: ` says after that; none if there is no such line, or more.
    pub fn error(&self) -> Option<&str> {
        let mut errors = self.stderr.lines().filter_map(|line| line.strip_prefix("error: "));
        errors.next().filter(|_| errors.next().is_none())
    }
}

/// Looks until `seen` gives something; fails after [`WAIT_TIMEOUT`].
pub fn until<T>(what: &str, mut seen: impl FnMut() -> Option<T>) -> T {
    const PAUSE: Duration = Duration::from_millis(5);
    let started = Instant::now();
    loop {
        if let Some(value) = seen() {
            return value;
        }
        assert!(started.elapsed() < WAIT_TIMEOUT, "waited in vain for {what}");
        std::thread::sleep(PAUSE);
    }
}

/// As [`until`]; fails also as soon as `running` has ended without it.
pub fn wait_until<T>(what: &str, running: &mut Running, mut seen: impl FnMut(&Running) -> Option<T>) -> T {
    until(what, || {
        let ended = running.has_ended();
        let value = seen(running);
        assert!(value.is_some() || !ended, "waited in vain for {what}: it has ended");
        value
    })
}

/// The parent's id from `/proc/<pid>/stat`, whose second field may hold anything between its brackets.
fn parent_of(pid: i32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1).map(str::to_owned)
}

/// The whole contents, without moving the offset that the process writes at.
fn text(file: &File) -> String {
    let bytes = std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}
