//! Shared parts of the daemons: settings from file, environment and flags; logs; health and metrics
//! over HTTP; accepted connections; shutdown; and the main function from flags to the exit code.

pub mod config;
pub mod http;
pub mod incoming;
pub mod log;
pub mod program;
pub mod shutdown;
