//! Size and hash of a file in transfer.

use sha2::{Digest, Sha256};

use crate::v1::FileDigest;

/// Size and SHA-256 of a file whose bytes come piece by piece.
#[derive(Debug, Clone, Default)]
pub struct DigestBuilder {
    size: u64,
    hash: Sha256,
}

impl DigestBuilder {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> FileDigest {
        let mut builder = Self::default();
        builder.update(bytes);
        builder.finish()
    }

    /// Takes the next piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        self.hash.update(bytes);
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The digest of all pieces.
    pub fn finish(self) -> FileDigest {
        FileDigest { size: self.size, sha256: self.hash.finalize().to_vec() }
    }
}
