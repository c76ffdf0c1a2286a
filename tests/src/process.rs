//! Processes: starting, watching, signalling and waiting. Every wait has a time limit.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde_json::Value;

pub use rustix::process::Signal;

/// The time limit of every wait, far longer than any successful wait takes.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(180);
/// The maximum number of lines of a process's log that a failed test prints.
const MAX_SHOWN_LINES: usize = 60;

/// A process, identified by a descriptor, because its id could be reused by another process.
#[derive(Debug)]
pub struct Process {
    /// The command line.
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

    /// Waits for the exit. Returns false if the process does not exit within [`WAIT_TIMEOUT`].
    pub fn wait(&self) -> bool {
        let limit = Timespec::try_from(WAIT_TIMEOUT).unwrap();
        poll(&mut [PollFd::new(&self.descriptor, PollFlags::IN)], Some(&limit)).unwrap() > 0
    }
}

/// A process that a test has started. Dropping this kills the process. If the test fails, it also
/// prints the last lines of the process's stderr.
#[derive(Debug)]
pub struct Running {
    /// The handle of the process.
    pub process: Process,
    child: Child,
    stdout: File,
    stderr: File,
}

/// How a process ended.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; `None` if a signal killed the process.
    pub code: Option<i32>,
    /// The whole stdout.
    pub stdout: String,
    /// The whole stderr.
    pub stderr: String,
}

impl Running {
    /// Starts `command`. Its stdin stays open until this is dropped.
    pub fn start(command: &mut Command) -> Self {
        let (stdout, stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        command.stdin(Stdio::piped()).stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
        let child = command.spawn().unwrap();
        let process = Process::open(Pid::from_child(&child)).unwrap();
        Self { process, child, stdout, stderr }
    }

    /// Returns the child processes that are still running.
    pub fn children(&self) -> Vec<Process> {
        let parent = self.child.id().to_string();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| parent_of(*pid).as_ref() == Some(&parent))
            .filter_map(|pid| Process::open(Pid::from_raw(pid)?))
            .collect()
    }

    /// Returns the stdout so far.
    pub fn stdout(&self) -> String {
        text(&self.stdout)
    }

    /// Returns the stderr so far.
    pub fn stderr(&self) -> String {
        text(&self.stderr)
    }

    /// Returns whether the process has exited.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for the exit. The test fails if the process does not exit within [`WAIT_TIMEOUT`].
    pub fn wait(mut self) -> Finished {
        if !self.process.wait() {
            let Process { arguments, .. } = &self.process;
            panic!("{arguments:?} did not exit within {WAIT_TIMEOUT:?}; stderr:\n{}", self.stderr());
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
        // Both calls fail if the process has already exited.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// Runs `command` and waits for its exit.
    pub fn run(command: &mut Command) -> Self {
        Running::start(command).wait()
    }

    /// Returns `self`. The test fails if the exit code is not `code`.
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Parses stdout as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// Returns the rest of the only line of stderr that starts with `error: `; `None` if there is
    /// no such line or more than one.
    pub fn error(&self) -> Option<&str> {
        let mut errors = self.stderr.lines().filter_map(|line| line.strip_prefix("error: "));
        errors.next().filter(|_| errors.next().is_none())
    }
}

/// Calls `seen` until it returns a value. The test fails after [`WAIT_TIMEOUT`].
pub fn until<T>(what: &str, mut seen: impl FnMut() -> Option<T>) -> T {
    const PAUSE: Duration = Duration::from_millis(5);
    let started = Instant::now();
    loop {
        if let Some(value) = seen() {
            return value;
        }
        assert!(started.elapsed() < WAIT_TIMEOUT, "timed out waiting for {what}");
        std::thread::sleep(PAUSE);
    }
}

/// Like [`until`]. The test also fails as soon as `running` has exited and `seen` returns nothing.
pub fn wait_until<T>(what: &str, running: &mut Running, mut seen: impl FnMut(&Running) -> Option<T>) -> T {
    until(what, || {
        let ended = running.has_ended();
        let value = seen(running);
        assert!(value.is_some() || !ended, "the process exited while waiting for {what}");
        value
    })
}

/// Returns the id of the parent from `/proc/<pid>/stat`. The second field is in parentheses and may
/// contain any characters.
fn parent_of(pid: i32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1).map(str::to_owned)
}

/// Reads the whole file without moving the offset at which the process writes.
fn text(file: &File) -> String {
    let bytes = std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}
