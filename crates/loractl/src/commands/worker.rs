//! `loractl worker`: a worker process of `loractl run`.

use std::io::Read;
use std::process::ExitCode;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Work for the coordinator that started this process; ends with its stdin.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the coordinator serves gRPC: `http://host:port`.
    #[arg(long)]
    coordinator: String,
    /// Name of this worker.
    #[arg(long)]
    name: String,
    /// Threads that compute.
    #[arg(long)]
    threads: usize,
}

pub(crate) fn execute(args: Args) -> anyhow::Result<ExitCode> {
    let stop = CancellationToken::new();
    stop_with_parent(stop.clone())?;
    let options = lora_worker::Options::local(args.coordinator, args.name, args.threads);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        tokio::select! {
            ended = lora_worker::run(options, stop.clone()) => ended?,
            _ = terminate.recv() => {}
        }
        anyhow::Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The parent holds the other end of this process's stdin, and only its death closes it. The thread ends with the process.
fn stop_with_parent(stop: CancellationToken) -> anyhow::Result<()> {
    let watch = move || {
        let mut byte = [0];
        while matches!(std::io::stdin().read(&mut byte), Ok(1..)) {}
        stop.cancel();
    };
    std::thread::Builder::new().name("parent".into()).spawn(watch).context("cannot start a thread")?;
    Ok(())
}
