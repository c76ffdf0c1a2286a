//! The binary under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use escargot::CargoBuild;
use escargot::error::CargoError;

/// A command of `loractl`, which is built on first use, with the profile and in the target directory of the test that calls.
///
/// The features of dependencies are those of the whole workspace, so that nothing that `cargo test --workspace` has built is
/// built again.
pub fn loractl() -> Command {
    // A failure is kept as well: it is the same for every test.
    static BUILT: OnceLock<Result<PathBuf, CargoError>> = OnceLock::new();
    match BUILT.get_or_init(build) {
        Ok(path) => Command::new(path),
        Err(error) => panic!("loractl cannot be built: {error}"),
    }
}

fn build() -> Result<PathBuf, CargoError> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    // <target>/<profile>/deps/<test>
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let target = profile.parent().unwrap();
    let cargo =
        CargoBuild::new().manifest_path(manifest).target_dir(target).arg("--workspace").bin("loractl");
    let cargo = if profile.ends_with("release") { cargo.release() } else { cargo };
    Ok(cargo.run()?.path().to_owned())
}
