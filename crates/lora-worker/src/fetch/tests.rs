mod buckets;
mod eviction;
mod http;
mod hub;
mod roots;
mod stored;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lora_proto::{DigestBuilder, v1};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use super::{FetchError, FetchedFiles, InputFetcher};

/// A limit that no test reaches.
const LARGE_CACHE: u64 = 1 << 30;
const TEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A cache for files of the coordinator.
fn cache(dir: &Path, max_bytes: u64) -> InputFetcher {
    InputFetcher::open(dir, max_bytes, Vec::new()).unwrap()
}

/// A channel on which nothing listens.
fn unreachable_channel() -> Channel {
    Channel::from_static("http://127.0.0.1:1").connect_lazy()
}

fn stored_file(name: &str, content: &[u8]) -> v1::StoredFile {
    v1::StoredFile { name: name.to_owned(), digest: Some(DigestBuilder::of_bytes(content)) }
}

/// A job's inputs: a base of one file and training rows.
fn inputs(base: &[u8], train: &[u8]) -> v1::Inputs {
    let files = vec![stored_file("config.json", base)];
    inputs_with(v1::base::Source::Files(v1::FileSet { files }), train)
}

fn inputs_with(base: v1::base::Source, train: &[u8]) -> v1::Inputs {
    v1::Inputs {
        base: Some(v1::Base { source: Some(base) }),
        train: vec![stored_file("train.jsonl", train)],
        eval: None,
        init_from: Vec::new(),
        tokens: Vec::new(),
    }
}

/// Returns the error of a fetch that must fail.
fn refusal(result: Result<FetchedFiles, FetchError>) -> FetchError {
    match result {
        Ok(_) => panic!("it was fetched"),
        Err(error) => error,
    }
}

/// All files under `dir` and its subdirectories.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(tree(&path)),
            false => files.push(path),
        }
    }
    files
}

/// Waits until `condition` holds.
async fn until(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(TEST_TIMEOUT, wait).await.unwrap();
}

fn temp() -> TempDir {
    tempfile::tempdir().unwrap()
}
