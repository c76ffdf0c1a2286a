//! A job on one machine: an embedded coordinator, and worker processes that connect to it over
//! gRPC. The processes run this executable on CPUs, and an installed `lora-worker` on GPUs.

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
