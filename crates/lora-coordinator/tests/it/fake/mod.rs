//! A coordinator on a free port, and workers that speak its API without an engine.

mod cluster;
mod worker;

pub(crate) use cluster::{Cluster, fast_config, job};
pub(crate) use worker::{FakeWorker, TwoWorkerJob, held, train};

use std::time::Duration;

/// The longest that anything may take.
pub(crate) const WAIT_TIMEOUT: Duration = Duration::from_secs(20);
