//! A coordinator on a free port, and fake workers that use its API but do not train.

mod cluster;
mod worker;

pub(crate) use cluster::{Cluster, fast_config, job};
pub(crate) use worker::{FakeWorker, TwoWorkerJob, held, train};

use std::time::Duration;

/// The time limit of every wait.
pub(crate) const WAIT_TIMEOUT: Duration = Duration::from_secs(20);
