//! What daemons share: settings from file, environment and flags; logs; health and metrics over
//! HTTP; accepted connections; shutdown; and the way from flags to the end.

pub mod config;
pub mod http;
pub mod incoming;
pub mod log;
pub mod program;
pub mod shutdown;
