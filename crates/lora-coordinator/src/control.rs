//! The control of jobs: what is observed of [`workers`] and their members, the pure decisions
//! ([`reconcile`], [`request`]), and [`jobs`], which stores and applies them.

pub(crate) mod action;
mod fault;
pub(crate) mod group;
pub(crate) mod job;
pub(crate) mod jobs;
pub(crate) mod member;
mod membership;
pub(crate) mod reconcile;
pub(crate) mod request;
pub(crate) mod workers;
