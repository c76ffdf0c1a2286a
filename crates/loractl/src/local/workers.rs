//! The worker processes of a local run.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use indicatif::ProgressBar;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Lines of a worker's stderr that are kept to explain its end.
const TAIL_LINES: usize = 20;
/// How long the last lines of an ended worker are waited for.
const LAST_LINES: Duration = Duration::from_secs(1);

/// How worker processes are started.
#[derive(Debug, Clone)]
pub(crate) struct WorkerOptions {
    /// Where the coordinator serves gRPC: `http://host:port`.
    pub(crate) coordinator: String,
    /// Threads that each computes with.
    pub(crate) threads: usize,
    /// Where they keep what they fetch.
    pub(crate) cache_dir: PathBuf,
}

/// Worker processes. Dropping this kills them.
pub(crate) struct Workers {
    options: WorkerOptions,
    /// What they write to stderr goes above it.
    bar: ProgressBar,
    farewell: CancellationToken,
    running: JoinSet<std::io::Result<WorkerExit>>,
}

/// How a worker process ended.
pub(crate) struct WorkerExit {
    /// Which of the workers, from 0.
    pub(crate) index: usize,
    status: ExitStatus,
    /// The end of what it wrote to stderr.
    tail: String,
}

impl Workers {
    /// None yet.
    pub(crate) fn new(options: WorkerOptions, bar: &ProgressBar) -> Self {
        Self { options, bar: bar.clone(), farewell: CancellationToken::new(), running: JoinSet::new() }
    }

    /// Starts a process of this executable.
    pub(crate) fn start(&mut self, index: usize) -> anyhow::Result<()> {
        let executable = std::env::current_exe().context("cannot find this executable")?;
        let WorkerOptions { coordinator, threads, cache_dir } = &self.options;
        let child = Command::new(&executable)
            .args(["worker", "--coordinator", coordinator, "--name", &name(index)])
            .args(["--threads", &threads.to_string()])
            .arg("--cache-dir")
            .arg(cache_dir)
            // Held open until the child is to end: its end tells the child so, also when this process dies.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A Ctrl-C in the terminal is for this process alone.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", executable.display()))?;
        self.running.spawn(watch(index, child, self.farewell.clone(), self.bar.clone()));
        Ok(())
    }

    /// The next worker that ends; none when all have.
    pub(crate) async fn next_exit(&mut self) -> Option<anyhow::Result<WorkerExit>> {
        let ended = self.running.join_next().await?;
        Some(ended.map_err(anyhow::Error::from).and_then(|exit| exit.context("cannot wait for a worker")))
    }

    /// Tells all to end; those that have not within `limit` are killed.
    pub(crate) async fn finish(mut self, limit: Duration) {
        self.farewell.cancel();
        // Killed by being dropped.
        let _ = timeout(limit, async { while self.running.join_next().await.is_some() {} }).await;
    }
}

impl std::fmt::Display for WorkerExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ended with {}", name(self.index), self.status)?;
        if !self.tail.is_empty() {
            write!(f, "; its last lines:\n{}", self.tail)?;
        }
        Ok(())
    }
}

/// The name of a worker.
fn name(index: usize) -> String {
    format!("worker-{index}")
}

async fn watch(
    index: usize,
    mut child: Child,
    farewell: CancellationToken,
    bar: ProgressBar,
) -> std::io::Result<WorkerExit> {
    let mut stdin = child.stdin.take();
    let stderr = child.stderr.take();
    let mut tail = VecDeque::new();
    let status = {
        let mut forwarding = std::pin::pin!(forward(stderr, name(index), &bar, &mut tail));
        let mut forwarded = false;
        let status = loop {
            tokio::select! {
                status = child.wait() => break status?,
                () = &mut forwarding, if !forwarded => forwarded = true,
                () = farewell.cancelled(), if stdin.is_some() => stdin = None,
            }
        };
        if !forwarded {
            // A grandchild could hold the pipe open.
            let _ = timeout(LAST_LINES, forwarding).await;
        }
        status
    };
    Ok(WorkerExit { index, status, tail: Vec::from(tail).join("\n") })
}

async fn forward(
    stderr: Option<impl AsyncRead + Unpin>,
    name: String,
    bar: &ProgressBar,
    tail: &mut VecDeque<String>,
) {
    let Some(stderr) = stderr else { return };
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        bar.suspend(|| eprintln!("{name}: {line}"));
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line);
    }
}
