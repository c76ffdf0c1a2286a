//! The coordinator: accepts jobs over gRPC, gives them to workers, and keeps their events,
//! checkpoints and results.
//!
//! One task, `service::Service`, owns every worker and every job that is neither paused nor ended.
//! Every decision is committed to `store::Store` before it is sent. Calls that only read use the
//! store directly.

mod admission;
mod config;
mod control;
mod coordinator;
mod metrics;
mod rpc;
mod scheduler;
mod store;

pub use config::Config;
pub use coordinator::{Coordinator, CoordinatorError, Handle, run};
