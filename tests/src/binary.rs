//! The binaries under test.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use escargot::CargoBuild;
use escargot::error::CargoError;
use escargot::format::Message;

const NAMES: [&str; 3] = ["loractl", "lora-coordinator", "lora-worker"];

/// Returns a command that runs `loractl` with a cache in the target directory, not in the user's
/// directory.
pub fn loractl() -> Command {
    let program = binary("loractl");
    let mut command = Command::new(program);
    // <target>/<profile>/loractl
    let target = program.ancestors().nth(2).unwrap();
    command.env("XDG_CACHE_HOME", target.join("tmp/test-cache"));
    command
}

/// Returns a command that runs `lora-coordinator`.
pub fn lora_coordinator() -> Command {
    Command::new(binary("lora-coordinator"))
}

/// Returns a command that runs `lora-worker`.
pub fn lora_worker() -> Command {
    Command::new(binary("lora-worker"))
}

/// Returns the path of a binary. The first call builds all binaries, with the profile and in the
/// target directory of the running test.
fn binary(name: &str) -> &'static Path {
    // A failure is cached as well, because it is the same for every test.
    static BUILT: OnceLock<Result<BTreeMap<String, PathBuf>, CargoError>> = OnceLock::new();
    match BUILT.get_or_init(build) {
        Ok(paths) => &paths[name],
        Err(error) => panic!("the binaries cannot be built: {error}"),
    }
}

/// Builds the binaries with the features that the whole workspace enables in dependencies, so that
/// nothing that `cargo test --workspace` has built is rebuilt.
fn build() -> Result<BTreeMap<String, PathBuf>, CargoError> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    // <target>/<profile>/deps/<test>
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let target = profile.parent().unwrap();
    let cargo = CargoBuild::new().manifest_path(manifest).target_dir(target).arg("--workspace");
    let cargo = if profile.ends_with("release") { cargo.release() } else { cargo };
    // Cargo sets variables about the test's own package. A build script that reads such variables
    // would run again, and everything that depends on it would be rebuilt.
    let package_variables = std::env::vars_os().map(|(name, _)| name).filter(|name| {
        ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix))
    });
    let cargo = package_variables.fold(cargo, CargoBuild::env_remove);
    let mut paths = BTreeMap::new();
    for message in NAMES.into_iter().fold(cargo, CargoBuild::bin).exec()? {
        match message?.decode()? {
            Message::CompilerArtifact(artifact) => {
                let path = artifact.executable.map(|path| path.into_owned());
                paths.extend(path.map(|path| (artifact.target.name.into_owned(), path)));
            }
            Message::CompilerMessage(found) => eprint!("{}", found.message.rendered.unwrap_or_default()),
            _ => {}
        }
    }
    Ok(paths)
}
