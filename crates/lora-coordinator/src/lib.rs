//! The coordinator: accepts jobs over gRPC, gives them to workers, and keeps their events, checkpoints and results.
//!
//! One thread, the [service](service::Service), owns every job and every worker's entry and does all that changes them; the
//! gRPC side translates calls into commands for it. Files are written by it alone, uploads in progress aside.

mod command;
mod coordinator;
mod group;
mod job;
mod job_log;
mod metrics_file;
mod output_dir;
mod refusal;
mod reports;
mod rpc;
mod service;

pub use coordinator::{Coordinator, CoordinatorError, Handle, Options};
pub use output_dir::{OutputError, check_output_dir};
