//! The programs `lora-worker` of this machine, and what they were built for.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use super::child::{ChildError, last, stdout};

const PROGRAM: &str = "lora-worker";

/// A program `lora-worker`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) path: PathBuf,
    pub(crate) build: Build,
}

/// What a program says that it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Build {
    /// A worker for GPUs.
    Cuda {
        /// Its version.
        version: String,
    },
    /// A worker that computes on CPUs alone.
    Cpu,
    /// It says nothing: why.
    Unknown(String),
}

/// The program at `given`; without one those beside this executable and on `PATH`, in this order. Each may take until `limit` to
/// say what it is.
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
        // One that several directories lead to is one.
        let program = directory.join(PROGRAM).canonicalize();
        found.extend(program.ok().filter(|program| program.is_file() && !found.contains(program)));
    }
    found
}

/// `lora-worker VERSION`, and `cuda` where it was built so.
async fn build(path: &Path, limit: Duration) -> Build {
    let text = match stdout(Command::new(path).arg("--version"), limit).await {
        Ok(text) => text,
        Err(error) => return Build::Unknown(reason(&error)),
    };
    // Libraries write there too.
    let said =
        text.lines().find(|line| line.split(' ').next() == Some(PROGRAM)).unwrap_or_else(|| last(&text));
    match said.split(' ').collect::<Vec<_>>()[..] {
        [PROGRAM, version, "cuda"] => Build::Cuda { version: version.to_owned() },
        [PROGRAM, _] => Build::Cpu,
        _ => Build::Unknown(format!("says {said:?} of itself: it is no {PROGRAM} of this kind")),
    }
}

/// Where the loader found no library, its name.
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
        // Written by another process: one that was forked from this one meanwhile would hold the file open for writing.
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
