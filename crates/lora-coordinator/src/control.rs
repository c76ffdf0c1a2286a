//! The control of jobs: one task observes the workers, decides what each job needs next, and
//! applies the decisions.

pub(crate) mod command;
pub(crate) mod job;
mod membership;
pub(crate) mod reconcile;
pub(crate) mod service;
pub(crate) mod workers;
