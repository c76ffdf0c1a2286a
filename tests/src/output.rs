//! The contents of a job's output directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value;
use sha2::{Digest, Sha256};

/// The parts of a result that must not depend on how the job was run.
#[derive(Debug, PartialEq, Eq)]
pub struct RunOutcome {
    /// The SHA-256 of `adapter_model.safetensors`, in hexadecimal.
    pub adapter_sha256: String,
    /// The text of `receipt.json`.
    pub receipt: String,
    /// The text of `metrics.jsonl`.
    pub metrics: String,
}

impl RunOutcome {
    /// Reads the outcome of the finished run in `dir`.
    pub fn read(dir: &Path) -> Self {
        Self {
            adapter_sha256: sha256(&dir.join("adapter_model.safetensors")),
            receipt: fs::read_to_string(dir.join("receipt.json")).unwrap(),
            metrics: fs::read_to_string(dir.join("metrics.jsonl")).unwrap(),
        }
    }
}

/// Returns the SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> String {
    hex::encode(Sha256::digest(fs::read(path).unwrap()))
}

/// Parses a JSON file.
pub fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Parses the rows of a JSON Lines text.
pub fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Parses the complete rows that `metrics.jsonl` in `dir` has so far.
pub fn metrics(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap_or_default();
    json_lines(text.rsplit_once('\n').map_or("", |(rows, _)| rows))
}

/// Returns the modification time and the hash of every file below `dir`. Snapshots differ if a file
/// was written.
pub fn snapshot(dir: &Path) -> BTreeMap<PathBuf, (SystemTime, String)> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(snapshot(&path));
        } else {
            files.insert(path.clone(), (path.metadata().unwrap().modified().unwrap(), sha256(&path)));
        }
    }
    files
}
