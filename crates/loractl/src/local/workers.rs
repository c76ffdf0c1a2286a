//! The worker processes of a local run.

use std::collections::VecDeque;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use indicatif::ProgressBar;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Lines of a worker's stderr that are kept to explain its end.
const TAIL_LINES: usize = 20;
/// How long the last lines of an ended worker are waited for.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Worker processes. Dropping this kills them.
pub(crate) struct Workers {
    running: JoinSet<std::io::Result<WorkerExit>>,
}

/// How a worker process ended.
pub(crate) struct WorkerExit {
    pub(crate) name: String,
    pub(crate) status: ExitStatus,
    /// The end of what it wrote to stderr.
    pub(crate) tail: String,
}

impl Workers {
    /// Starts `count` processes of this executable; what they write to stderr goes above `bar`.
    pub(crate) fn start(
        count: usize,
        threads: usize,
        coordinator: &str,
        bar: &ProgressBar,
    ) -> anyhow::Result<Self> {
        let executable = std::env::current_exe().context("cannot find this executable")?;
        let mut running = JoinSet::new();
        for index in 0..count {
            let name = format!("worker-{index}");
            let child = Command::new(&executable)
                .args(["worker", "--coordinator", coordinator, "--name", &name])
                .args(["--threads", &threads.to_string()])
                // Held open until the child has ended: its end tells the child that this process died.
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                // A Ctrl-C in the terminal is for this process alone.
                .process_group(0)
                .kill_on_drop(true)
                .spawn()
                .with_context(|| format!("cannot start {}", executable.display()))?;
            running.spawn(watch(name, child, bar.clone()));
        }
        Ok(Self { running })
    }

    /// The next worker that ends; none when all have.
    pub(crate) async fn next_exit(&mut self) -> Option<anyhow::Result<WorkerExit>> {
        let ended = self.running.join_next().await?;
        Some(ended.map_err(anyhow::Error::from).and_then(|exit| exit.context("cannot wait for a worker")))
    }

    /// Waits for all to end, which they were told to; those that have not within `limit` are killed.
    pub(crate) async fn finish(mut self, limit: Duration) {
        // Killed by being dropped.
        let _ = timeout(limit, async { while self.running.join_next().await.is_some() {} }).await;
    }
}

impl std::fmt::Display for WorkerExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ended with {}", self.name, self.status)?;
        if !self.tail.is_empty() {
            write!(f, "; its last lines:\n{}", self.tail)?;
        }
        Ok(())
    }
}

async fn watch(name: String, mut child: Child, bar: ProgressBar) -> std::io::Result<WorkerExit> {
    let _stdin = child.stdin.take();
    let stderr = child.stderr.take();
    let mut tail = VecDeque::new();
    let status = {
        let mut forwarding = std::pin::pin!(forward(stderr, &name, &bar, &mut tail));
        tokio::select! {
            status = child.wait() => {
                // A grandchild could hold the pipe open.
                let _ = timeout(LAST_LINES, forwarding).await;
                status?
            }
            () = &mut forwarding => child.wait().await?,
        }
    };
    Ok(WorkerExit { name, status, tail: Vec::from(tail).join("\n") })
}

async fn forward(
    stderr: Option<impl AsyncRead + Unpin>,
    name: &str,
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
