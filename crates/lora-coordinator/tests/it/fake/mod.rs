//! A coordinator on a free port, and workers that speak its API without an engine.

mod cluster;
mod worker;

pub(crate) use cluster::{Cluster, job, quick};
pub(crate) use worker::{FakeWorker, Pair, held, train};

use std::time::Duration;

/// The longest that anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
