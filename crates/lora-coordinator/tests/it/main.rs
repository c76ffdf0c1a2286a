//! Tests of the coordinator over its real API, with fake workers that do not train.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod bad_input;
mod cancel;
mod failures;
mod fake;
mod lifecycle;
mod memory;
mod owner;
mod restart;
mod scheduling;
mod watch;
