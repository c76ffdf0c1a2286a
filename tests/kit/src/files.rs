//! Files of this repository.

use std::path::{Path, PathBuf};

/// Returns the path of a golden file or directory, such as `models/llama-gqa`.
pub fn golden(name: impl AsRef<Path>) -> PathBuf {
    repository().join("tests/golden").join(name)
}

/// Returns the path of a file or directory of the example `dates`, such as `base`.
pub fn example(name: impl AsRef<Path>) -> PathBuf {
    repository().join("examples/dates").join(name)
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}
