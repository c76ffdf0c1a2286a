//! Admission: checks of a submitted job and its inputs, before workers see them.

pub(crate) mod inputs;
pub(crate) mod submit;
pub(crate) mod validate;
