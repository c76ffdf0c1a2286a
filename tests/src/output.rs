//! What lies in a job's output directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value;
use sha2::{Digest, Sha256};

/// What must not depend on how a job was run.
#[derive(Debug, PartialEq, Eq)]
pub struct RunOutcome {
    /// SHA-256 of `adapter_model.safetensors`.
    pub adapter_sha256: String,
    /// Text of `receipt.json`.
    pub receipt: String,
    /// Text of `metrics.jsonl`.
    pub metrics: String,
}

impl RunOutcome {
    /// Of the finished run in `dir`.
    pub fn read(dir: &Path) -> Self {
        Self {
            adapter_sha256: sha256(&dir.join("adapter_model.safetensors")),
            receipt: fs::read_to_string(dir.join("receipt.json")).unwrap(),
            metrics: fs::read_to_string(dir.join("metrics.jsonl")).unwrap(),
        }
    }
}

/// The SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> String {
    hex::encode(Sha256::digest(fs::read(path).unwrap()))
}

/// A JSON file.
pub fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The rows of a JSON Lines text.
pub fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The whole rows that `metrics.jsonl` in `dir` has so far.
pub fn metrics(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap_or_default();
    json_lines(text.rsplit_once('\n').map_or("", |(rows, _)| rows))
}

/// Every file below `dir`, with what tells whether it was touched: when it was written, and its hash.
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
