//! The coordinator's metrics for Prometheus.

use lora_spec::JobState;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::control::workers::Workers;

/// Handles of the metrics.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    jobs: Family<StateLabel, Gauge>,
    workers: Gauge,
    free_workers: Gauge,
    steps: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

impl Metrics {
    /// Creates the metrics and registers them in `registry`.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "lora_jobs",
            "Jobs that are neither paused nor ended, by state",
            metrics.jobs.clone(),
        );
        registry.register("lora_workers", "Connected workers", metrics.workers.clone());
        registry.register(
            "lora_workers_free",
            "Connected workers without a job",
            metrics.free_workers.clone(),
        );
        registry.register("lora_steps", "Optimizer steps that were stored", metrics.steps.clone());
        metrics
    }

    pub(crate) fn observe(&self, states: impl Iterator<Item = JobState>, workers: &Workers) {
        let states: Vec<JobState> = states.collect();
        for state in JobState::ALL.into_iter().filter(|state| !state.is_stopped()) {
            let count = states.iter().filter(|other| **other == state).count();
            self.jobs.get_or_create(&StateLabel { state: state.name() }).set(count as i64);
        }
        self.workers.set(workers.iter().filter(|(_, worker)| worker.is_connected()).count() as i64);
        self.free_workers.set(workers.iter().filter(|(_, worker)| worker.is_free()).count() as i64);
    }

    pub(crate) fn count_steps(&self, steps: u64) {
        self.steps.inc_by(steps);
    }
}
