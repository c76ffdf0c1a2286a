//! Size and hash of a transferred file.

use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::v1::FileDigest;

impl FileDigest {
    /// Returns the SHA-256 in hexadecimal, in lower case.
    pub fn hex(&self) -> String {
        hex::encode(&self.sha256)
    }
}

/// Computes the size and SHA-256 of a file whose bytes arrive in pieces.
#[derive(Debug, Clone, Default)]
pub struct DigestBuilder {
    size: u64,
    hash: Sha256,
}

impl DigestBuilder {
    /// Returns the digest of `bytes`.
    pub fn of_bytes(bytes: &[u8]) -> FileDigest {
        let mut builder = Self::default();
        builder.update(bytes);
        builder.finish()
    }

    /// Returns the digest of the file at `path`. Blocks the thread.
    ///
    /// # Errors
    /// The file cannot be opened or read.
    pub fn of_file(path: &Path) -> io::Result<FileDigest> {
        let mut file = std::fs::File::open(path)?;
        let mut builder = Self::default();
        let mut piece = vec![0; 1 << 18];
        loop {
            match file.read(&mut piece)? {
                0 => return Ok(builder.finish()),
                read => builder.update(&piece[..read]),
            }
        }
    }

    /// Adds the next piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        self.hash.update(bytes);
    }

    /// Returns the number of bytes so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the digest of all pieces.
    pub fn finish(self) -> FileDigest {
        FileDigest { size: self.size, sha256: self.hash.finalize().to_vec() }
    }
}
