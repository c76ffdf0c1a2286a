//! The networked service: every coordinator, worker and client is a process with its own
//! directories.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod base;
mod cancel;
mod commands;
mod compose;
mod daemons;
mod data;
mod failures;
mod pause;
mod restart;
mod result;
mod scheduling;
mod tokens;

use std::path::Path;
use std::sync::OnceLock;

use lora_e2e::{Fixture, RunOutcome, TestService};
use lora_proto::v1::{self, job_event};

/// The steps of [`Fixture::with_short_steps`].
const STEPS: u64 = 48;

/// The outcome of `loractl run` for the job of [`Fixture::with_short_steps`] on one worker, without
/// disturbances.
fn reference_outcome() -> &'static RunOutcome {
    static OUTCOME: OnceLock<RunOutcome> = OnceLock::new();
    OUTCOME.get_or_init(|| Fixture::with_short_steps().finish("out", &["--workers", "1", "--threads", "1"]))
}

/// Waits for the result of the job of a [`Fixture::with_short_steps`], and compares it with the
/// undisturbed outcome: the same bits, and every step once.
fn expect_reference_outcome(service: &TestService, job_id: &str, dir: &Path) {
    let outcome = service.result(job_id, dir);
    assert_eq!(outcome.adapter_sha256, reference_outcome().adapter_sha256);
    assert_eq!(outcome.metrics, reference_outcome().metrics);
    let steps: Vec<u64> = lora_e2e::metrics(dir).iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>());
}

/// The groups to which a job was assigned, in order.
fn groups(service: &TestService, job_id: &str) -> Vec<v1::Assigned> {
    let assigned = |event: v1::JobEvent| match event.kind {
        Some(job_event::Kind::Assigned(assigned)) => Some(assigned),
        _ => None,
    };
    service.api().events(job_id).into_iter().filter_map(assigned).collect()
}

/// The workers of a job that were lost, in order.
fn lost(service: &TestService, job_id: &str) -> Vec<String> {
    let lost = |event: v1::JobEvent| match event.kind {
        Some(job_event::Kind::WorkerLost(lost)) => Some(lost.worker),
        _ => None,
    };
    service.api().events(job_id).into_iter().filter_map(lost).collect()
}
