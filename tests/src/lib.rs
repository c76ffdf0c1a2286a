//! What the end-to-end tests share: the built `loractl`, processes that are waited for with a limit, and a small job.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

mod binary;
mod fixture;
mod output;
mod process;

pub use binary::loractl;
pub use fixture::Fixture;
pub use output::{Outcome, checkpoints, json, json_lines, metrics, sha256, snapshot};
pub use process::{Finished, LIMIT, Process, Running, Signal, wait_until};
