//! Directories outside of the loader's search path that often have CUDA's libraries.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// Returns a directory that has `file`, among those of CUDA's and Python's packages, of WSL and of
/// container runtimes. Callers ask only for libraries that the loader does not find.
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

/// Returns the library directories of NVIDIA's wheels, for every Python 3 in `root`.
fn wheels(root: &Path) -> Vec<PathBuf> {
    let pythons = starting_with(&root.join("lib"), "python3");
    let packages =
        pythons.iter().flat_map(|python| ["site-packages", "dist-packages"].map(|dir| python.join(dir)));
    packages.flat_map(|dir| starting_with(&dir.join("nvidia"), "")).map(|wheel| wheel.join("lib")).collect()
}

/// Returns the entries of `directory` whose names start with `start`, in order.
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
    fn wheels_are_found_for_every_python_3_of_an_environment() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
        fs::create_dir_all(&lib).unwrap();
        fs::create_dir_all(root.path().join("lib/python2.7/site-packages/nvidia/cu13/lib")).unwrap();
        assert_eq!(wheels(root.path()), [lib]);
        assert!(wheels(&root.path().join("nowhere")).is_empty());
    }
}
