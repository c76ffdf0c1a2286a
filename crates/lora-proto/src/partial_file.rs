//! A file that arrives in chunks.

use std::io;
use std::path::Path;

use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use crate::DigestBuilder;
use crate::v1::FileDigest;

/// A file on disk of which only the beginning may have arrived.
pub struct PartialFile {
    file: File,
    digest: DigestBuilder,
}

impl PartialFile {
    /// Opens the file at `path`, creates it if it does not exist, and hashes the bytes that it has
    /// already.
    ///
    /// # Errors
    /// The file cannot be created or read.
    pub async fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path).await?;
        let mut digest = DigestBuilder::default();
        let mut piece = vec![0; 1 << 18];
        loop {
            match file.read(&mut piece).await? {
                0 => return Ok(Self { file, digest }),
                read => digest.update(&piece[..read]),
            }
        }
    }

    /// Number of bytes that have arrived.
    pub fn size(&self) -> u64 {
        self.digest.size()
    }

    /// Digest of the bytes that have arrived.
    pub fn digest(&self) -> FileDigest {
        self.digest.clone().finish()
    }

    /// Appends a chunk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub async fn write(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.file.write_all(chunk).await?;
        // Flushing ensures that no write is pending if the file is dropped after an error of the
        // sender: the next transfer continues after this chunk.
        self.file.flush().await?;
        self.digest.update(chunk);
        Ok(())
    }

    /// Drops the bytes that have arrived.
    ///
    /// # Errors
    /// The file cannot be written.
    pub async fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0).await?;
        self.file.rewind().await?;
        self.digest = DigestBuilder::default();
        Ok(())
    }

    /// Flushes the file to disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub async fn sync(&self) -> io::Result<()> {
        self.file.sync_all().await
    }
}
