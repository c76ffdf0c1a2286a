//! An all-reduce among processes: starts, connects and watches them, and ends them within a limit.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use lora_train::AllReduceMeasurement;

use super::message::RankMessage;
use super::{ProbeError, joined};

/// Lines of the ranks that are read ahead. Ranks that write more block.
const MAX_BUFFERED_LINES: usize = 64;
/// Limit of the wait for other ranks after one has failed. Peers of a failed rank fail too, perhaps
/// before it: only together do the errors show the cause.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);
/// Limit of the wait for the end of ranks that are done or were killed.
const END_LIMIT: Duration = Duration::from_secs(5);
/// Interval at which a process that is about to end is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Number of output streams of a process: stdout and stderr.
const STREAMS: usize = 2;

/// Ranks that ended without an answer for the same reason.
#[derive(Debug)]
pub struct RankFailure {
    ranks: Vec<usize>,
    reason: String,
}

impl fmt::Display for RankFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} failed: {}", joined(&self.ranks, ", "), self.reason)
    }
}

/// All-reduces a vector among `ranks` processes, each of which calls [`run_rank`](super::run_rank).
/// `command` creates the process of a rank. The logs of the processes, on stderr or stdout, are
/// written to stderr, each line with its rank.
///
/// # Errors
/// A process failed, or was not done within `limit`.
pub fn all_reduce(
    ranks: usize,
    limit: Duration,
    command: impl Fn(usize) -> Command,
) -> Result<AllReduceMeasurement, ProbeError> {
    let mut ranks = Ranks::start(ranks, limit, command)?;
    let addresses = ranks.collect(|rank| rank.address.clone())?;
    ranks.send_line(&addresses.join(" "));
    let readings = ranks.collect(|rank| rank.reading.clone())?;
    ranks.wait_for_end();
    let first = readings.into_iter().next();
    first.ok_or_else(|| io::Error::other("an all-reduce takes at least one rank").into())
}

/// The processes of all ranks. Dropping the struct kills the processes that still run.
struct Ranks {
    ranks: Vec<Rank>,
    events: Receiver<Event>,
    /// The ranks that have ended, in that order.
    ended: Vec<usize>,
    limit: Duration,
    deadline: Instant,
}

struct Rank {
    child: Child,
    /// Closing it is the rank's signal to end.
    stdin: ChildStdin,
    address: Option<String>,
    reading: Option<AllReduceMeasurement>,
    open_streams: usize,
    /// The last error that the rank wrote.
    error: Option<String>,
    /// The last line of its logs.
    last_line: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

/// A line or the end of a stream of a rank.
struct Event {
    rank: usize,
    stream: Stream,
    /// `None` if the stream has ended.
    line: Option<String>,
}

impl Ranks {
    fn start(count: usize, limit: Duration, command: impl Fn(usize) -> Command) -> io::Result<Self> {
        let deadline = Instant::now() + limit;
        let (sender, events) = sync_channel(MAX_BUFFERED_LINES);
        let mut ranks = Self { ranks: Vec::new(), events, ended: Vec::new(), limit, deadline };
        for number in 0..count {
            let (rank, stdout, stderr) = Rank::start(command(number))?;
            // This comes first: a rank in the list is killed if a later operation fails.
            ranks.ranks.push(rank);
            read(number, Stream::Stdout, stdout, sender.clone())?;
            read(number, Stream::Stderr, stderr, sender.clone())?;
        }
        Ok(ranks)
    }

    /// Returns the answers of all ranks, once each rank has given one.
    fn collect<T>(&mut self, answer: impl Fn(&Rank) -> Option<T>) -> Result<Vec<T>, ProbeError> {
        loop {
            let answers: Vec<Option<T>> = self.ranks.iter().map(&answer).collect();
            let missing: Vec<usize> =
                answers.iter().enumerate().filter(|(_, it)| it.is_none()).map(|(rank, _)| rank).collect();
            if missing.is_empty() {
                return Ok(answers.into_iter().flatten().collect());
            }
            if self.ended.iter().any(|rank| missing.contains(rank)) {
                return Err(self.failure(answer));
            }
            if !self.take_event(self.deadline) {
                return Err(ProbeError::Hung { ranks: missing, limit: self.limit });
            }
        }
    }

    fn failure<T>(&mut self, answer: impl Fn(&Rank) -> Option<T>) -> ProbeError {
        let deadline = self.deadline.min(Instant::now() + SETTLE_LIMIT);
        while self.ended.len() < self.ranks.len() && self.take_event(deadline) {}
        let mut failures: Vec<RankFailure> = Vec::new();
        for &rank in &self.ended {
            if answer(&self.ranks[rank]).is_some() {
                continue;
            }
            let reason = self.ranks[rank].reason();
            match failures.iter_mut().find(|failure| failure.reason == reason) {
                Some(failure) => failure.ranks.push(rank),
                None => failures.push(RankFailure { ranks: vec![rank], reason }),
            }
        }
        ProbeError::Failed(failures)
    }

    /// Waits for an event and processes it. Returns false if none came before `deadline`.
    fn take_event(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        // A rank that writes without pause has an event ready at any time.
        if left.is_zero() {
            return false;
        }
        let Ok(Event { rank: number, stream, line }) = self.events.recv_timeout(left) else { return false };
        let rank = &mut self.ranks[number];
        let Some(line) = line else {
            rank.open_streams -= 1;
            if rank.open_streams == 0 {
                self.ended.push(number);
            }
            return true;
        };
        match RankMessage::parse(&line).filter(|_| stream == Stream::Stdout) {
            Some(RankMessage::Address(address)) => rank.address = Some(address),
            Some(RankMessage::Reading(reading)) => rank.reading = Some(reading),
            None => rank.log(number, line),
        }
        true
    }

    /// Writes a line to the stdin of every rank.
    fn send_line(&mut self, line: &str) {
        for rank in &mut self.ranks {
            // If a rank has ended, the wait for its answer reports that.
            let _ = writeln!(rank.stdin, "{line}").and_then(|()| rank.stdin.flush());
        }
    }

    /// Waits until the ranks, which are done, have written all their logs.
    fn wait_for_end(&mut self) {
        let deadline = self.deadline.min(Instant::now() + END_LIMIT);
        while self.ended.len() < self.ranks.len() && self.take_event(deadline) {}
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            // The process may have ended by itself.
            let _ = rank.child.kill();
        }
        let deadline = Instant::now() + END_LIMIT;
        for rank in &mut self.ranks {
            let _ = wait_until(&mut rank.child, deadline);
        }
    }
}

impl Rank {
    fn start(mut command: Command) -> io::Result<(Self, ChildStdout, ChildStderr)> {
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = pipes.spawn()?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(io::Error::other("a process has no pipes"));
        };
        let rank = Self {
            child,
            stdin,
            address: None,
            reading: None,
            open_streams: STREAMS,
            error: None,
            last_line: None,
        };
        Ok((rank, stdout, stderr))
    }

    fn log(&mut self, number: usize, line: String) {
        // If writing to stderr fails, there is no other place for the line.
        let _ = writeln!(io::stderr(), "rank {number}: {line}");
        match line.strip_prefix("error: ") {
            Some(error) => self.error = Some(error.to_owned()),
            None => self.last_line = Some(line),
        }
    }

    /// The reason why a rank whose streams have ended gave no answer.
    fn reason(&mut self) -> String {
        let status = wait_until(&mut self.child, Instant::now() + SETTLE_LIMIT).ok().flatten();
        let signal = status.and_then(|status| status.signal());
        match (&self.error, status) {
            (Some(error), _) if signal.is_none() => error.clone(),
            (_, Some(status)) => with_line(&status.to_string(), self.last_line.as_deref()),
            (_, None) => with_line("its output ended", self.last_line.as_deref()),
        }
    }
}

fn with_line(text: &str, line: Option<&str>) -> String {
    line.map_or_else(|| text.to_owned(), |line| format!("{text}; its last line: {line}"))
}

/// Reads lines in a thread, which ends with the stream or with the receiver.
fn read(
    rank: usize,
    stream: Stream,
    pipe: impl Read + Send + 'static,
    sender: SyncSender<Event>,
) -> io::Result<()> {
    let read = move || {
        let lines = BufReader::new(pipe).split(b'\n').map_while(Result::ok);
        // A log may contain bytes that are not UTF-8.
        let lines = lines.map(|line| String::from_utf8_lossy(&line).trim_end().to_owned());
        let mut lines = lines.filter(|line| !line.is_empty()).map(Some).chain([None]);
        let _ = lines.try_for_each(|line| sender.send(Event { rank, stream, line }));
    };
    thread::Builder::new().name("probe-reader".into()).spawn(read).map(drop)
}

/// Waits until `child` has ended. Returns `None` if it still runs after `deadline`, which a process
/// that is stuck in the driver does even if it is killed.
fn wait_until(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        match child.try_wait()? {
            Some(status) => return Ok(Some(status)),
            None if Instant::now() >= deadline => return Ok(None),
            None => thread::sleep(POLL_INTERVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = r#"{"reading": {"through": "tcp", "world_size": 2, "bytes": 4, "seconds": 1}}"#;
    /// Far longer than these processes take.
    const PATIENT: Duration = Duration::from_secs(60);

    /// Two processes that run `script` with their rank as `$1` and [`ANSWER`] as `$2`.
    fn run(limit: Duration, script: &str) -> Result<AllReduceMeasurement, String> {
        let command = |rank: usize| {
            let mut command = Command::new("sh");
            command.args(["-c", script, "sh", &rank.to_string(), ANSWER]);
            command
        };
        all_reduce(2, limit, command).map_err(|error| error.to_string())
    }

    #[test]
    fn ranks_get_the_addresses_of_all_and_the_first_one_answers() {
        let script = r#"echo "{\"address\": \"at-$1\"}"; read first second
            [ "$first $second" = "at-0 at-1" ] && echo "$2" | sed "s/tcp/tcp-$1/""#;
        assert_eq!(run(PATIENT, script).unwrap().through, "tcp-0");
    }

    #[test]
    fn logs_on_stdout_are_not_answers() {
        let script = r#"echo NCCL version 2.28.9; printf 'not UTF-8: \377\n7\n'; printf 'cut off'
            printf '\n{"address": "here"}\n'; read addresses; echo '{"error": 1}'; printf 'NCCL INF'
            printf '\n%s\n' "$2"; echo 'O cut off'"#;
        assert_eq!(run(PATIENT, script).unwrap().through, "tcp");
    }

    #[test]
    fn ranks_that_hang_are_killed_at_the_limit() {
        let short = Duration::from_millis(200);
        assert_eq!(run(short, "exec sleep 1000").unwrap_err(), "no answer within 0.2 s from rank 0, 1");
        let one = r#"[ $1 = 1 ] && exec sleep 1000; echo '{"address": ""}'; read addresses"#;
        let long_enough = Duration::from_secs(2);
        assert_eq!(run(long_enough, one).unwrap_err(), "no answer within 2 s from rank 1");
        let writes_without_end = r#"while :; do echo '{"address": ""}'; done"#;
        let error = run(short, writes_without_end).unwrap_err();
        assert!(error.starts_with("no answer within 0.2 s"), "{error}");
    }

    #[test]
    fn ranks_that_fail_are_named_with_their_reasons() {
        let script = r#"echo '{"address": ""}'; read addresses; [ $1 = 0 ] && echo "$2" && exec sleep 1000
            echo NCCL WARN a log; echo error: no memory >&2; echo at the end >&2; exit 1"#;
        assert_eq!(run(PATIENT, script).unwrap_err(), "rank 1 failed: no memory");
        let before_the_address = "[ $1 = 0 ] && exec sleep 1000; echo NCCL WARN a log; exit 3";
        let reason = "rank 1 failed: exit status: 3; its last line: NCCL WARN a log";
        assert_eq!(run(PATIENT, before_the_address).unwrap_err(), reason);
        let killed = r#"[ $1 = 0 ] && echo '{"address": ""}' && exec sleep 1000; kill -KILL $$"#;
        assert_eq!(run(PATIENT, killed).unwrap_err(), "rank 1 failed: signal: 9 (SIGKILL)");
        let both = r#"echo '{"address": ""}'; read addresses; echo error: not here: $1 >&2; exit 1"#;
        let error = run(PATIENT, both).unwrap_err();
        assert!(error.contains("rank 0 failed: not here: 0"), "{error}");
        assert!(error.contains("rank 1 failed: not here: 1"), "{error}");
        let alike = r#"echo '{"address": ""}'; read addresses; echo error: not here >&2; exit 1"#;
        let error = run(PATIENT, alike).unwrap_err();
        assert!(
            ["rank 0, 1", "rank 1, 0"].iter().any(|ranks| error == format!("{ranks} failed: not here")),
            "{error}"
        );
    }

    #[test]
    fn the_wait_for_a_process_ends_at_the_deadline() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        assert!(wait_until(&mut child, Instant::now()).unwrap().is_none());
        child.kill().unwrap();
        assert_eq!(wait_until(&mut child, Instant::now() + PATIENT).unwrap().unwrap().signal(), Some(9));
    }
}
