//! A job on this machine alone: an embedded coordinator, and worker processes that reach it over gRPC: of this executable on
//! CPUs, of an installed `lora-worker` on GPUs.

mod fleet;
mod metrics_file;
mod output_dir;
mod run;
mod signals;
mod submission;
mod summary;
mod workers;

pub(crate) use fleet::DeviceChoice;
pub(crate) use run::{RunOptions, run_job};
