//! The files of the repository.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use lora_e2e::repository;

/// Directories in the root that are not part of the repository.
const OUTPUTS: [&str; 3] = [".git", "runs", "target"];

/// The paths of all files, from the root of the repository on.
pub(crate) fn all() -> &'static BTreeSet<String> {
    static FILES: OnceLock<BTreeSet<String>> = OnceLock::new();
    FILES.get_or_init(|| {
        let mut files = BTreeSet::new();
        collect(repository(), "", &mut files);
        files
    })
}

/// Whether a file or directory has this path.
pub(crate) fn exists(path: &str) -> bool {
    let path = path.trim_end_matches('/');
    let inside = format!("{path}/");
    path.is_empty()
        || all().contains(path)
        || all().range(inside.clone()..).next().is_some_and(|file| file.starts_with(&inside))
}

/// The text of a file.
pub(crate) fn text(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap()
}

fn collect(directory: &Path, prefix: &str, files: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let is_output = prefix.is_empty() && OUTPUTS.contains(&name.as_str());
        if is_output || name == "__pycache__" {
            continue;
        }
        let path = format!("{prefix}{name}");
        if entry.file_type().unwrap().is_dir() {
            collect(&entry.path(), &format!("{path}/"), files);
        } else {
            files.insert(path);
        }
    }
}
