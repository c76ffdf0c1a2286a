//! Hashes what the rows of a dataset depend on besides the dataset and the settings: the sources of
//! this crate and of `lora-spec`, and the versions of the dependencies. Encoded rows of another
//! build are not used.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

fn main() -> Result<(), Box<dyn Error>> {
    let crate_dir = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
    let mut hash = Sha256::new();
    for path in ["src", "../lora-spec/src", "../../Cargo.lock"] {
        println!("cargo::rerun-if-changed={path}");
        add(&mut hash, &crate_dir.join(path))?;
    }
    println!("cargo::rustc-env=LORA_DATA_BUILD={}", hex::encode(hash.finalize()));
    Ok(())
}

/// Adds the contents of a file, or of all files below a directory in the order of their names.
fn add(hash: &mut Sha256, path: &Path) -> Result<(), Box<dyn Error>> {
    if !path.is_dir() {
        hash.update(Sha256::digest(fs::read(path)?));
        return Ok(());
    }
    let mut entries =
        fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, std::io::Error>>()?;
    entries.sort();
    entries.iter().try_for_each(|entry| add(hash, entry))
}
