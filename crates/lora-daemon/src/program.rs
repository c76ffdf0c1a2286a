//! A daemon's way from its flags to its end.

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
    /// A setting, such as log.filter=debug; can be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

impl Flags {
    /// Loads and checks the settings and runs `daemon` with them, to its end. The exit code is 0 where that is as it should
    /// be, 1 after an error, which is logged, and 2 for settings that are wrong.
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
        // What still blocks a thread is of no use to anybody.
        runtime.shutdown_background();
        match ended {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!(error = error_chain(&error), "ended");
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

/// An error and what it comes of.
fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Many name their cause themselves.
        let words = error.to_string();
        if !text.contains(&words) {
            text += &format!(": {words}");
        }
        cause = error.source();
    }
    text
}
