//! The files of the repository.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use lora_e2e::repository;

/// Directories in the root that are not part of the repository.
const OUTPUTS: [&str; 2] = ["runs", "target"];
/// The hidden directory that is part of the repository.
const CI: &str = ".ci";

/// The paths of all files, relative to the root of the repository.
pub(crate) fn all() -> &'static BTreeSet<String> {
    static FILES: OnceLock<BTreeSet<String>> = OnceLock::new();
    FILES.get_or_init(|| {
        let mut files = BTreeSet::new();
        collect(repository(), "", &mut files);
        files
    })
}

/// Whether a file or a directory with this path exists.
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
        let is_directory = entry.file_type().unwrap().is_dir();
        let is_output = prefix.is_empty() && OUTPUTS.contains(&name.as_str());
        let is_hidden = name.starts_with('.') && name != CI;
        if is_directory && (is_output || is_hidden || name == "__pycache__") {
            continue;
        }
        let path = format!("{prefix}{name}");
        if is_directory {
            collect(&entry.path(), &format!("{path}/"), files);
        } else {
            files.insert(path);
        }
    }
}
