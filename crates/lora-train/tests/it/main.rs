//! Runs of whole jobs on a tiny base.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod by_hand;
mod common;
mod evaluation;
mod groups;
mod init_lora_weights;
mod run;
