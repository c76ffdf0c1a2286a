//! The coordinator: accepts jobs over gRPC, gives them to workers, and keeps their events,
//! checkpoints and results.
//!
//! One task, `service::Service`, owns every worker and every job that is neither paused nor ended.
//! Every decision is committed to `store::Store` before it is sent. Calls that only read use the
//! store directly.

mod command;
mod config;
mod coordinator;
mod inputs;
mod job;
mod membership;
mod metrics;
mod reconcile;
mod refusal;
mod rpc;
mod scheduler;
mod service;
mod store;
mod validate;
mod workers;

pub use config::Config;
pub use coordinator::{Coordinator, CoordinatorError, Handle, run};
