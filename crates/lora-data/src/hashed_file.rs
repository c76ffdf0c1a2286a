//! A file that is hashed while it is read.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};

use lora_spec::SourceFile;
use sha2::{Digest, Sha256};

/// A file that is hashed while it is read. It counts the bytes in a cell that its user sees.
pub(crate) struct HashedFile<'a> {
    file: File,
    size: u64,
    hash: Sha256,
    read: &'a Cell<u64>,
}

impl<'a> HashedFile<'a> {
    pub(crate) fn open(file: &SourceFile, read: &'a Cell<u64>) -> io::Result<Self> {
        let file = File::open(file.path())?;
        Ok(Self { size: file.metadata()?.len(), file, hash: Sha256::new(), read })
    }

    /// The size of the file when it was opened, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Reads the rest, and returns the SHA-256 of the whole file, in hex.
    pub(crate) fn finish(mut self) -> io::Result<String> {
        let mut buffer = vec![0; 1 << 18];
        while self.read(&mut buffer)? > 0 {}
        Ok(hex::encode(self.hash.finalize()))
    }
}

impl Read for HashedFile<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.hash.update(&buffer[..read]);
        self.read.set(self.read.get() + read as u64);
        Ok(read)
    }
}
