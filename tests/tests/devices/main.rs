//! How `loractl` finds and uses GPUs. The tests make fake files for the driver, the libraries and
//! the worker, which the loader finds before those of the machine.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod doctor;
mod fakes;
mod probe;
mod run;
