//! The subcommands, one file each.

pub(crate) mod cancel;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod doctor;
pub(crate) mod download;
pub(crate) mod generate;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod merge;
pub(crate) mod pause;
pub(crate) mod plan;
pub(crate) mod probe;
pub(crate) mod push;
pub(crate) mod quickstart;
pub(crate) mod resume;
pub(crate) mod run;
pub(crate) mod status;
pub(crate) mod submit;
pub(crate) mod verify;
pub(crate) mod watch;
pub(crate) mod worker;
pub(crate) mod workers;

mod apply_to_jobs;

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::address;
use crate::client::Client;

/// Checks that the directory of `--base` exists.
pub(crate) fn check_base(base: &Path) -> Result<()> {
    match (base.is_dir(), base.to_string_lossy().contains("://")) {
        (true, _) => Ok(()),
        (false, true) => bail!("--base: {} must be downloaded first; name its directory", base.display()),
        (false, false) => bail!("--base: {} is not a directory", base.display()),
    }
}

/// Connects to the coordinator at the `given` address, or else at the configured one, and runs
/// `work`.
pub(crate) fn online<T>(given: Option<&str>, work: impl AsyncFnOnce(Client) -> Result<T>) -> Result<T> {
    let address = address::coordinator(given)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async { work(Client::connect(&address).await?).await })
}
