//! The metrics of a worker at `/metrics`.

use lora_daemon::http::Health;
use lora_proto::v1::Phase;
use lora_train::{ComputeDevice, StepReport, memory_usage};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::status::CurrentJob;

/// Work that the engine has done. A clone shares the counters.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counters {
    steps: Counter,
    tokens: Counter,
}

impl Counters {
    /// Counts a finished step.
    pub(crate) fn count_step(&self, report: &StepReport) {
        self.steps.inc();
        self.tokens.inc_by(report.tokens);
    }
}

/// The connection and the phase of the worker.
#[derive(Debug, Default)]
pub(crate) struct Gauges {
    connected: Gauge,
    phase: Family<[(&'static str, String); 1], Gauge>,
}

impl Gauges {
    /// Registers all metrics. The library appends `_total` to the names of counters.
    pub(crate) fn register(&self, counters: &Counters, registry: &mut Registry) {
        let steps = "Optimizer steps that this worker took part in";
        registry.register("lora_worker_steps", steps, counters.steps.clone());
        let tokens = "Tokens of those steps, over all workers of the group";
        registry.register("lora_worker_tokens", tokens, counters.tokens.clone());
        let connected = "Whether the coordinator is connected";
        registry.register("lora_worker_connected", connected, self.connected.clone());
        let phase = "The phase of the worker's job; idle: no job";
        registry.register("lora_worker_phase", phase, self.phase.clone());
    }

    /// Follows changes, updates the metrics and reports whether the worker is ready for work. Never
    /// returns.
    pub(crate) async fn follow(
        &self,
        mut status: watch::Receiver<Option<CurrentJob>>,
        mut connected: watch::Receiver<bool>,
        health: &Health,
    ) {
        loop {
            let is_connected = *connected.borrow_and_update();
            self.connected.set(is_connected.into());
            health.set_ready(is_connected, "no coordinator is connected");
            let phase = status.borrow_and_update().as_ref().map(|job| job.phase);
            self.phase.clear();
            self.phase
                .get_or_create(&[("phase", phase.map_or_else(|| "idle".to_owned(), Phase::name))])
                .set(1);
            let changed = tokio::select! {
                changed = status.changed() => changed,
                changed = connected.changed() => changed,
            };
            if changed.is_err() {
                // The worker ends.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Memory of a GPU. A clone shares the gauges.
#[derive(Debug, Clone)]
pub(crate) struct DeviceMemoryGauges {
    used: Gauge,
    reserved: Gauge,
    total: Gauge,
}

impl DeviceMemoryGauges {
    /// The gauges for `device`. `None` for the CPU.
    pub(crate) fn for_device(device: &ComputeDevice) -> Option<Self> {
        let memory = Self { used: Gauge::default(), reserved: Gauge::default(), total: Gauge::default() };
        memory.measure(device).then_some(memory)
    }

    /// Registers all metrics.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let used = "Bytes of the GPU's memory in this worker's tensors";
        registry.register("lora_worker_device_memory_used_bytes", used, self.used.clone());
        let reserved = "Bytes of the GPU's memory in this worker's memory pool, in use or kept for later";
        registry.register("lora_worker_device_memory_reserved_bytes", reserved, self.reserved.clone());
        let total = "Bytes of the GPU's memory, used and free";
        registry.register("lora_worker_device_memory_bytes", total, self.total.clone());
    }

    /// Measures the memory in use. Returns false if `device` does not report it.
    pub(crate) fn measure(&self, device: &ComputeDevice) -> bool {
        let Ok(Some(memory)) = memory_usage(device) else { return false };
        self.used.set(memory.used_bytes as i64);
        self.reserved.set(memory.reserved_bytes as i64);
        self.total.set(memory.total_bytes as i64);
        true
    }
}
