//! A job on this machine alone: an embedded coordinator, and worker processes of this executable that reach it over gRPC.

mod metrics_file;
mod output_dir;
mod run;
mod signals;
mod start;
mod summary;
mod workers;

pub(crate) use run::{RunOptions, run_job};
