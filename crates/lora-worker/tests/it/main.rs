//! A worker with its engine, and a fake coordinator.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod connection;
mod end;
mod fake;
mod groups;
mod job;
mod one_worker;
mod uploads;
mod worker;
