//! SHA-256 of files and buffers, in lower-case hexadecimal.

use std::fs::File;
use std::io::Read;

use lora_spec::SourceFile;
use sha2::{Digest, Sha256};

use crate::ModelError;

/// Returns the SHA-256 of a buffer.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// Returns the SHA-256 of a file's contents.
///
/// # Errors
/// The file cannot be read.
pub fn sha256_file(source: &SourceFile) -> Result<String, ModelError> {
    let io = |error| ModelError::io(source, error);
    let mut file = File::open(source.path()).map_err(io)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(io)?;
        if n == 0 {
            return Ok(hex::encode(hasher.finalize()));
        }
        hasher.update(&buffer[..n]);
    }
}
