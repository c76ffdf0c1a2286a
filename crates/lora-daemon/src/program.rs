//! The main function of a daemon, from its flags to its exit code.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use lora_spec::FieldError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

use crate::config;
use crate::log::{self, LogConfig};
use crate::shutdown::{self, ShutdownSignals};

/// The flags of every daemon.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// TOML file with settings.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting, for example log.filter=debug; can be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

impl Flags {
    /// Loads and checks the settings, and runs `daemon` with them until it ends. The exit code is 0
    /// for success, 1 after an error, which is logged, and 2 for invalid settings.
    pub fn run<C, E: Error>(
        &self,
        check: impl FnOnce(&C) -> Result<(), FieldError>,
        log: impl FnOnce(&C) -> &LogConfig,
        daemon: impl AsyncFnOnce(C, ShutdownSignals) -> Result<(), E>,
    ) -> ExitCode
    where
        C: Default + Serialize + DeserializeOwned,
    {
        let config = match config::load(self.config.as_deref(), &self.sets, check) {
            Ok(config) => config,
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::from(2);
            }
        };
        log::init(log(&config));
        let (runtime, signals) = match prepare() {
            Ok(prepared) => prepared,
            Err(error) => {
                tracing::error!(%error, "cannot start");
                return ExitCode::FAILURE;
            }
        };
        let ended = runtime.block_on(daemon(config, signals));
        // Does not wait for blocking tasks, because their results are not used any more.
        runtime.shutdown_background();
        match ended {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!(error = error_chain(&error), "ended with an error");
                ExitCode::FAILURE
            }
        }
    }
}

fn prepare() -> io::Result<(Runtime, ShutdownSignals)> {
    let runtime = Runtime::new()?;
    let signals = runtime.block_on(async { shutdown::shutdown_signals() })?;
    Ok((runtime, signals))
}

/// Formats an error with its causes, each once.
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Many errors already include the message of their cause.
        let message = error.to_string();
        if !text.contains(&message) {
            text += &format!(": {message}");
        }
        cause = error.source();
    }
    text
}
