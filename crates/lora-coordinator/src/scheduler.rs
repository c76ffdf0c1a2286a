//! The scheduler: a pure function from jobs and workers to placements, and the code that applies them.

mod apply;
pub(crate) mod placement;
