//! Detection of CUDA on this machine. loractl does not link CUDA: its libraries are loaded by name
//! in child processes, which may hang or crash. Training on GPUs is done by an installed
//! `lora-worker` that was built for CUDA.

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

/// Time limit for the answer of the driver, of a library or of a program. The first start on a
/// machine reads more than half a gigabyte of CUDA's libraries, perhaps from a network disk.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// A query that a child process of this executable answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProbeQuery {
    /// The driver and its GPUs; the answer is a [`Driver`].
    Driver,
    /// One of [`LIBRARIES`]; the answer is a [`Loaded`].
    Library(&'static Library),
}

impl ProbeQuery {
    /// The query about the library with this file name; `None` for an unknown file.
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

    /// Runs the query in a child process, which is killed after `limit`.
    pub(crate) async fn ask<T: DeserializeOwned>(self, limit: Duration) -> Result<T, ChildError> {
        let file = match self {
            Self::Driver => driver::DRIVER_LIBRARY,
            Self::Library(library) => library.file,
        };
        let executable = std::env::current_exe().map_err(ChildError::Start)?;
        answer(Command::new(executable).args(["probe", file]), limit).await
    }
}
