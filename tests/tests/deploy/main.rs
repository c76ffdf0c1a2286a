//! Images, compose file and manifests against the programs: every flag, variable, value, file, port and path in them is one
//! that the programs know.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

mod compose_file;
mod containers;
mod images;
mod manifests;
mod probes;
