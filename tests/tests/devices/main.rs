//! GPUs as `loractl` finds and uses them. The driver, the libraries and the worker are played by files that the tests make;
//! the loader finds them before any that the machine has.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod doctor;
mod fakes;
mod probe;
mod run;
