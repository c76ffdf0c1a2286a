//! What daemons share: settings from file, environment and flags; logs; health and metrics over HTTP; and shutdown.

pub mod config;
pub mod http;
pub mod log;
pub mod shutdown;
