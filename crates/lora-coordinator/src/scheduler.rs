//! The scheduler: a pure function from jobs and workers to placements, and the code that applies
//! the placements.

mod apply;
pub(crate) mod placement;
