//! Where libraries often are without that the loader looks there.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// A directory that has `file`, of those that CUDA's and Python's packages, WSL and container runtimes put it in. What the
/// loader finds by itself is not asked for here.
pub(crate) fn find_unsearched(file: &str) -> Option<PathBuf> {
    directories().into_iter().find(|directory| directory.join(file).is_file())
}

fn directories() -> Vec<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
    let toolkits: Vec<PathBuf> = toolkits.chain(starting_with(Path::new("/usr/local"), "cuda")).collect();
    let of_toolkits = toolkits
        .iter()
        .flat_map(|root| ["lib64", "lib", "targets/x86_64-linux/lib"].map(|lib| root.join(lib)));
    let pythons = [
        variable("VIRTUAL_ENV"),
        variable("CONDA_PREFIX"),
        variable("HOME").map(|home| home.join(".local")),
        Some("/usr/local".into()),
        Some("/usr".into()),
    ];
    let of_wheels = pythons.into_iter().flatten().flat_map(|root| wheels(&root));
    let others = ["/usr/lib/wsl/lib", "/usr/local/nvidia/lib64", "/run/opengl-driver/lib"].map(PathBuf::from);
    let conda = variable("CONDA_PREFIX").map(|root| root.join("lib"));
    of_toolkits.chain(of_wheels).chain(conda).chain(others).collect()
}

/// Where NVIDIA's wheels have their libraries, of every Python in `root`.
fn wheels(root: &Path) -> Vec<PathBuf> {
    let pythons = starting_with(&root.join("lib"), "python3");
    let packages =
        pythons.iter().flat_map(|python| ["site-packages", "dist-packages"].map(|dir| python.join(dir)));
    packages.flat_map(|dir| starting_with(&dir.join("nvidia"), "")).map(|wheel| wheel.join("lib")).collect()
}

/// What `directory` has of a name that starts so, in order.
fn starting_with(directory: &Path, start: &str) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(start))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheels_are_found_in_any_python_of_an_environment() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
        fs::create_dir_all(&lib).unwrap();
        fs::create_dir_all(root.path().join("lib/python2.7/site-packages/nvidia/cu13/lib")).unwrap();
        assert_eq!(wheels(root.path()), [lib]);
        assert!(wheels(&root.path().join("nowhere")).is_empty());
    }
}
