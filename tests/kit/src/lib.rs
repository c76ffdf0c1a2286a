//! What the tests of several crates share.
//!
//! [`golden`] and [`example`] name files of this repository. [`numbers`] compares results with
//! references. With the feature `services`, [`artifacts`] is a store with faults that the test
//! defines, and [`server`] serves gRPC on a free port.
//!
//! The kit does not know the crates that it tests, except `lora-proto` and `lora-daemon` for the
//! services. Begin reading at the function that a test calls.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[cfg(feature = "services")]
pub mod artifacts;
mod files;
pub mod numbers;
#[cfg(feature = "services")]
pub mod server;

pub use files::{example, golden};
