//! The coordinator: accepts jobs over gRPC, gives them to workers, and keeps their events, checkpoints and results.
//!
//! One task, the [service](service::Service), owns every job that is not at rest and every worker. What it decides is in the
//! [store](store::Store) before anybody hears of it; calls that only read go to the store directly.

mod command;
mod config;
mod coordinator;
mod inputs;
mod job;
mod metrics;
mod reconcile;
mod refusal;
mod regroup;
mod rpc;
mod schedule;
mod scheduling;
mod service;
mod store;
mod validate;
mod workers;

pub use config::Config;
pub use coordinator::{Coordinator, CoordinatorError, Handle, run};
