//! The worker processes of a local run.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use indicatif::ProgressBar;
use lora_collective::backend_choice::Collective;
use lora_collective::{nccl_log_variable, shared_gpu_variables};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::fleet::{CudaFleet, Fleet};

/// Number of lines of a worker's stderr that are kept, to explain why it ended.
const MAX_TAIL_LINES: usize = 20;
/// How long to wait for the last lines of a worker that has ended.
const LAST_LINES_TIMEOUT: Duration = Duration::from_secs(1);

/// How worker processes are started.
#[derive(Debug, Clone)]
pub(crate) struct WorkerOptions {
    /// Address of the coordinator: `http://host:port`.
    pub(crate) coordinator: String,
    /// Number of workers.
    pub(crate) count: usize,
    /// Compute threads of each worker.
    pub(crate) threads: usize,
    /// Bytes of the machine's memory that each worker may use; `None`: the worker detects its
    /// memory.
    pub(crate) memory: Option<u64>,
    /// Directory for files that the workers fetch.
    pub(crate) cache_dir: PathBuf,
    pub(crate) fleet: Fleet,
    /// Transport of gradients between GPUs.
    pub(crate) collective: Collective,
}

/// Worker processes. Dropping this kills them.
pub(crate) struct WorkerProcesses {
    options: WorkerOptions,
    /// The lines that workers write to stderr are shown above this bar.
    bar: ProgressBar,
    shutdown: CancellationToken,
    running: JoinSet<std::io::Result<WorkerExit>>,
}

/// How a worker process ended.
pub(crate) struct WorkerExit {
    /// Number of the worker, from 0.
    pub(crate) index: usize,
    status: ExitStatus,
    /// The last lines that the worker wrote to stderr.
    tail: String,
}

impl WorkerProcesses {
    /// Creates the set of processes without starting any.
    pub(crate) fn new(options: WorkerOptions, bar: &ProgressBar) -> Self {
        Self { options, bar: bar.clone(), shutdown: CancellationToken::new(), running: JoinSet::new() }
    }

    /// Starts the process of a worker.
    pub(crate) fn start(&mut self, index: usize) -> anyhow::Result<()> {
        let mut command = match &self.options.fleet {
            Fleet::Cpu => self.options.on_cpu(index)?,
            Fleet::Cuda(fleet) => self.options.on_gpu(index, fleet),
        };
        let child = command
            // The child exits when its stdin is closed, also if this process dies.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C in the terminal signals only this process.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", command.as_std().get_program().display()))?;
        self.running.spawn(watch(index, child, self.shutdown.clone(), self.bar.clone()));
        Ok(())
    }

    /// Waits for the next worker to end; `None` when all have ended.
    pub(crate) async fn next_exit(&mut self) -> Option<anyhow::Result<WorkerExit>> {
        let ended = self.running.join_next().await?;
        Some(ended.map_err(anyhow::Error::from).and_then(|exit| exit.context("cannot wait for a worker")))
    }

    /// Asks all workers to exit, and kills those that have not exited within `limit`.
    pub(crate) async fn finish(mut self, limit: Duration) {
        self.shutdown.cancel();
        // Dropping the remaining processes kills them.
        let _ = timeout(limit, async { while self.running.join_next().await.is_some() {} }).await;
    }
}

impl WorkerOptions {
    /// Returns the command for a worker on the CPU, which runs this executable.
    fn on_cpu(&self, index: usize) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("cannot find this executable")?);
        command
            .args(["worker", "--coordinator", &self.coordinator, "--name", &name(index)])
            .args(["--threads", &self.threads.to_string()])
            .arg("--cache-dir")
            .arg(&self.cache_dir);
        if let Some(memory) = self.memory {
            command.args(["--memory", &memory.to_string()]);
        }
        Ok(command)
    }

    /// Returns the command for a `lora-worker` with settings like those of
    /// [`crate::commands::worker`].
    fn on_gpu(&self, index: usize, fleet: &CudaFleet) -> Command {
        let mut command = Command::new(&fleet.worker);
        // Settings in the environment are meant for daemons, not for these workers.
        for (variable, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LORA__"))
        {
            command.env_remove(variable);
        }
        let log = std::env::var("RUST_LOG").unwrap_or_else(|_| "error".into());
        command.arg("--end-with-stdin").args(["--device", &fleet.device(index).to_string()]);
        for (key, value) in [
            ("coordinator", self.coordinator.as_str()),
            ("name", &name(index)),
            ("threads", &self.threads.to_string()),
            ("collective", &self.collective.to_string()),
            ("model_roots", "/"),
            ("peer.listen", "127.0.0.1:0"),
            ("http.listen", ""),
            ("log.filter", &log),
        ] {
            command.args(["--set", &format!("{key}={value}")]);
        }
        let is_set = |name: &str| std::env::var_os(name).is_some();
        // With `auto`, workers that share a GPU use TCP unless the environment allows NCCL.
        if self.collective == Collective::Nccl && fleet.is_shared_by(self.count) {
            command.envs(shared_gpu_variables(index, is_set));
        }
        command.envs(nccl_log_variable(is_set));
        let mut cache_dir = OsString::from("cache_dir=");
        cache_dir.push(&self.cache_dir);
        command.arg("--set").arg(cache_dir);
        command
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

/// Returns the name of a worker.
fn name(index: usize) -> String {
    format!("worker-{index}")
}

async fn watch(
    index: usize,
    mut child: Child,
    shutdown: CancellationToken,
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
                () = shutdown.cancelled(), if stdin.is_some() => stdin = None,
            }
        };
        if !forwarded {
            // The time limit is needed because a grandchild may keep the pipe open.
            let _ = timeout(LAST_LINES_TIMEOUT, forwarding).await;
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
        if tail.len() == MAX_TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line);
    }
}
