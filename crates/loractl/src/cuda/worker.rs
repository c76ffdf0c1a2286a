//! The `lora-worker` programs of this machine, and whether they were built for CUDA.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use super::child::{ChildError, last, stdout};

const PROGRAM: &str = "lora-worker";

/// A `lora-worker` program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) path: PathBuf,
    pub(crate) build: Build,
}

/// The build that a program reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Build {
    /// A worker for GPUs.
    Cuda {
        /// Version of the worker.
        version: String,
    },
    /// A worker that supports only CPUs.
    Cpu,
    /// The program does not report its build, for this reason.
    Unknown(String),
}

/// Returns the program at `given`, or else the programs beside this executable and on `PATH`, in
/// this order. A program that does not report its build within `limit` is killed.
pub(crate) async fn candidates(given: Option<&Path>, limit: Duration) -> Vec<Candidate> {
    let paths = match given {
        Some(path) => vec![path.to_owned()],
        None => installed(),
    };
    let mut candidates = Vec::new();
    for path in paths {
        let build = build(&path, limit).await;
        candidates.push(Candidate { path, build });
    }
    candidates
}

fn installed() -> Vec<PathBuf> {
    let beside = env::current_exe().ok().and_then(|path| path.parent().map(Path::to_owned));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut found: Vec<PathBuf> = Vec::new();
    for directory in beside.into_iter().chain(env::split_paths(&path)) {
        // Links may lead from several directories to the same program.
        let program = directory.join(PROGRAM).canonicalize();
        found.extend(program.ok().filter(|program| program.is_file() && !found.contains(program)));
    }
    found
}

/// Reads the build from `--version`: `lora-worker VERSION`, followed by `cuda` if it was built for
/// CUDA.
async fn build(path: &Path, limit: Duration) -> Build {
    let text = match stdout(Command::new(path).arg("--version"), limit).await {
        Ok(text) => text,
        Err(error) => return Build::Unknown(reason(&error)),
    };
    // Libraries write to stdout too.
    let line =
        text.lines().find(|line| line.split(' ').next() == Some(PROGRAM)).unwrap_or_else(|| last(&text));
    match line.split(' ').collect::<Vec<_>>()[..] {
        [PROGRAM, version, "cuda"] => Build::Cuda { version: version.to_owned() },
        [PROGRAM, _] => Build::Cpu,
        _ => Build::Unknown(format!("is not a supported {PROGRAM}: its --version prints {line:?}")),
    }
}

/// Formats the error. If the loader did not find a library, the text names the library.
fn reason(error: &ChildError) -> String {
    let text = error.to_string();
    match text.split_once("error while loading shared libraries: ") {
        Some((_, missing)) => format!("does not start: {missing}"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn of_script(script: &str) -> Build {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(PROGRAM);
        // Another process writes the file. If this process did, a child that is forked meanwhile
        // would hold the file open for writing.
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$2" && chmod +x "$2""#;
        let written = std::process::Command::new("sh").args(["-c", write, "sh", script]).arg(&path).status();
        assert!(written.unwrap().success());
        let found = candidates(Some(&path), Duration::from_secs(20)).await;
        assert_eq!((found.len(), &found[0].path), (1, &path));
        found[0].build.clone()
    }

    #[tokio::test]
    async fn worker_builds_are_recognized() {
        let cuda = Build::Cuda { version: "0.1.0".into() };
        assert_eq!(of_script("echo lora-worker 0.1.0 cuda").await, cuda);
        assert_eq!(of_script("echo lora-worker 0.1.0").await, Build::Cpu);
        assert_eq!(of_script("echo hello; echo lora-worker 0.1.0 cuda; echo goodbye").await, cuda);
        assert!(matches!(of_script("echo bash 5.2").await, Build::Unknown(why) if why.contains("bash 5.2")));
        let loader =
            "echo $0: error while loading shared libraries: libcublas.so.13: no such file >&2; exit 127";
        let why = "does not start: libcublas.so.13: no such file";
        assert_eq!(of_script(loader).await, Build::Unknown(why.into()));
        let nowhere = candidates(Some(Path::new("/nowhere")), Duration::from_secs(20)).await;
        assert!(matches!(&nowhere[0].build, Build::Unknown(why) if why.starts_with("cannot be started")));
    }
}
