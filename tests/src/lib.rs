//! Helpers of the end-to-end tests: the built binaries, processes whose waits have a time limit, a
//! small job, and the networked service.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

mod api;
mod binary;
pub mod compose;
pub mod container;
mod daemon;
pub mod dockerfile;
pub mod fake_hub;
mod fixture;
pub mod http;
pub mod kustomize;
mod output;
mod process;
mod service;
mod terminal;
mod yaml;

use std::path::Path;

pub use api::ApiClient;
pub use binary::{lora_coordinator, lora_worker, loractl};
pub use daemon::Daemon;
pub use fixture::Fixture;
pub use output::{RunOutcome, json, json_lines, metrics, sha256, snapshot};
pub use process::{Finished, Process, Running, Signal, WAIT_TIMEOUT, until, wait_until};
pub use service::{TestService, Worker, sets, without_settings};
pub use terminal::on_terminal;

/// Returns the root directory of this repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}
