//! The control of jobs. One task, [`service`], observes the workers, lets pure functions decide
//! ([`reconcile`], [`request`], and [`crate::scheduler`]), and has [`jobs`] store and apply the
//! decisions.

pub(crate) mod action;
pub(crate) mod command;
mod fault;
pub(crate) mod group;
pub(crate) mod job;
pub(crate) mod jobs;
pub(crate) mod member;
mod membership;
mod reconcile;
pub(crate) mod request;
pub(crate) mod service;
#[cfg(test)]
mod simulation;
pub(crate) mod workers;
