//! Compares images, compose file and manifests with the programs: every flag, variable, value,
//! file, port and path in them must be known to the programs.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

mod compose_file;
mod containers;
mod images;
mod manifests;
mod probes;
