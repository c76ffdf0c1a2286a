//! The coordinator: accepts jobs over gRPC, gives them to workers, and keeps their events,
//! checkpoints and results.
//!
//! One task, `service::Service`, owns every worker and every job that is neither paused nor ended.
//! It observes, lets pure functions decide (`control::reconcile`, `scheduler`), and applies their
//! actions in one place, `control::jobs`. A change of a job's state, members or
//! generation is committed to `store::Store` before it is sent. Calls that only read, and uploads,
//! use the store directly.
//!
//! The crate may not use tensors. To read it, begin with `service`, whose method `settle` is one
//! round, and `control::group`.

mod admission;
mod config;
mod control;
mod coordinator;
mod metrics;
mod refusal;
mod rpc;
mod scheduler;
mod service;
#[cfg(test)]
mod simulation;
mod store;

pub use config::Config;
pub use coordinator::{Coordinator, CoordinatorError, Handle, SHUTDOWN_LIMIT, run};
