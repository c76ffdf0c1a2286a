//! A file that arrives in chunks.

use std::path::{Path, PathBuf};

use lora_proto::DigestBuilder;
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use crate::fetch::FetchError;
use crate::fetch::source::RemoteFile;

/// A file on disk of which only the beginning may have arrived.
pub(super) struct PartialFile {
    path: PathBuf,
    file: File,
    digest: DigestBuilder,
}

impl PartialFile {
    /// Opens the file at `path`, and hashes the bytes that it has already.
    pub(super) async fn open(path: &Path) -> Result<Self, FetchError> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).await.map_err(FetchError::at(path))?;
        let mut digest = DigestBuilder::default();
        let mut piece = vec![0; 1 << 18];
        loop {
            match file.read(&mut piece).await.map_err(FetchError::at(path))? {
                0 => return Ok(Self { path: path.to_owned(), file, digest }),
                read => digest.update(&piece[..read]),
            }
        }
    }

    /// The number of bytes that have arrived.
    pub(super) fn size(&self) -> u64 {
        self.digest.size()
    }

    /// Drops the bytes that have arrived.
    pub(super) async fn restart(&mut self) -> Result<(), FetchError> {
        self.file.set_len(0).await.map_err(FetchError::at(&self.path))?;
        self.file.rewind().await.map_err(FetchError::at(&self.path))?;
        self.digest = DigestBuilder::default();
        Ok(())
    }

    /// Appends a chunk.
    pub(super) async fn write(&mut self, piece: &[u8]) -> Result<(), FetchError> {
        self.file.write_all(piece).await.map_err(FetchError::at(&self.path))?;
        // Flushing ensures that no write is pending if the file is dropped after an error of the
        // sender.
        self.file.flush().await.map_err(FetchError::at(&self.path))?;
        self.digest.update(piece);
        Ok(())
    }

    /// Compares the file with the size and hash that were announced for `from`. A file that is too
    /// long, or that has the right length but other bytes, is emptied.
    pub(super) async fn finish(mut self, remote_file: &RemoteFile, from: &str) -> Result<(), FetchError> {
        let (size, expected) = (self.size(), remote_file.size);
        if size < expected {
            let message = format!("the connection ended after {size} of {expected} bytes");
            return Err(FetchError::transient(from, message));
        }
        let same = remote_file.sha256().is_none_or(|sha256| self.digest.clone().finish().sha256 == sha256);
        if size > expected || !same {
            self.restart().await?;
            return Err(FetchError::transient(from, "the received file is corrupt; try again"));
        }
        self.file.sync_all().await.map_err(FetchError::at(&self.path))
    }
}
