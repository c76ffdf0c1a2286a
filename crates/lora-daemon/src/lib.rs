//! Shared parts of the daemons: settings from file, environment and flags; logs; health and metrics
//! over HTTP; accepted connections; shutdown; and the main function from flags to the exit code.
//!
//! The crate may not know what the daemons do. To read it, begin with [`program`].

pub mod config;
pub mod http;
pub mod incoming;
pub mod log;
pub mod program;
pub mod shutdown;
