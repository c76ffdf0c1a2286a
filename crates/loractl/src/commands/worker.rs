//! `loractl worker`: a worker process of `loractl run`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use lora_daemon::shutdown;
use lora_spec::DeviceSpec;
use lora_worker::{Config, end_with_stdin};

use crate::address;

/// Run a worker process for `loractl run`
///
/// The process exits as soon as its stdin is closed.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Example:
  loractl worker --coordinator http://127.0.0.1:7400 --name worker-0 --threads 1 --cache-dir cache"
)]
pub(crate) struct Args {
    /// Name of this worker.
    #[arg(long)]
    name: String,
    /// Number of compute threads.
    #[arg(long)]
    threads: usize,
    /// Bytes of this machine's memory that a job may use [default: all]
    #[arg(long)]
    memory: Option<u64>,
    /// Directory for files that are fetched for jobs.
    #[arg(long, value_name = "DIR")]
    cache_dir: PathBuf,
}

pub(crate) fn execute(args: Args, coordinator: Option<&str>) -> Result<ExitCode> {
    let config = config(args, address::coordinator(coordinator)?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let ended = runtime.block_on(async {
        let signals = shutdown::shutdown_signals().context("cannot listen for signals")?;
        let immediate = signals.immediate.clone();
        end_with_stdin(move || immediate.cancel()).context("cannot start a thread")?;
        lora_worker::run(config, signals.stop.clone(), signals.immediate.clone()).await?;
        Ok(ExitCode::SUCCESS)
    });
    // Computations that still run are abandoned: nothing reads their results.
    runtime.shutdown_background();
    ended
}

/// Settings of a worker that only this machine can reach, and that may read a base from any path.
fn config(args: Args, coordinator: String) -> Config {
    let Args { name, threads, memory, cache_dir } = args;
    let mut config = Config {
        name,
        coordinator,
        cache_dir,
        device: DeviceSpec::Cpu,
        threads,
        memory: memory.unwrap_or(0),
        model_roots: vec!["/".into()],
        ..Config::default()
    };
    config.peer.listen = "127.0.0.1:0".into();
    config.http.listen = String::new();
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worker_settings_are_valid() {
        let args =
            Args { name: "worker-0".into(), threads: 1, memory: Some(1 << 30), cache_dir: "cache".into() };
        config(args, "http://127.0.0.1:7400".into()).check().unwrap();
    }
}
