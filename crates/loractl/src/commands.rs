//! The subcommands, a file each.

pub(crate) mod generate;
pub(crate) mod plan;
pub(crate) mod quickstart;
pub(crate) mod run;
pub(crate) mod verify;
pub(crate) mod worker;
