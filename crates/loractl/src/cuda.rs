//! What this machine has of CUDA. loractl links none of it: libraries are loaded by their names, in child processes, which
//! may hang or crash, and GPUs are computed on by an installed `lora-worker` that was built for CUDA.

mod child;
mod driver;
mod libraries;
mod search_paths;
mod worker;

use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::process::Command;

pub(crate) use child::{ChildError, answer};
pub(crate) use driver::{Driver, DriverGpu, MIN_CUDA_VERSION, version_text};
pub(crate) use libraries::{LIBRARIES, Library, Loaded};
pub(crate) use search_paths::find_unsearched;
pub(crate) use worker::{Build, Candidate, candidates};

/// How long the driver, and each program or library that is asked something, may take to answer. The
/// first start on a machine reads more than half a gigabyte of CUDA's libraries, perhaps from a network
/// disk.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// What a child process of this executable can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProbeQuery {
    /// About the driver and its GPUs: [`Driver`].
    Driver,
    /// About one of [`LIBRARIES`]: [`Loaded`].
    Library(&'static Library),
}

impl ProbeQuery {
    /// The question about the library of this file.
    pub(crate) fn named(file: &str) -> Option<Self> {
        if file == driver::DRIVER_LIBRARY {
            return Some(Self::Driver);
        }
        LIBRARIES.iter().find(|library| library.file == file).map(Self::Library)
    }

    /// Answers in this process, as JSON.
    pub(crate) fn answer(self) -> anyhow::Result<String> {
        Ok(match self {
            Self::Driver => serde_json::to_string(&Driver::load()?)?,
            Self::Library(library) => serde_json::to_string(&library.load()?)?,
        })
    }

    /// Asks a child process, which may take until `limit`.
    pub(crate) async fn ask<T: DeserializeOwned>(self, limit: Duration) -> Result<T, ChildError> {
        let file = match self {
            Self::Driver => driver::DRIVER_LIBRARY,
            Self::Library(library) => library.file,
        };
        let executable = std::env::current_exe().map_err(ChildError::Start)?;
        answer(Command::new(executable).args(["probe", file]), limit).await
    }
}
