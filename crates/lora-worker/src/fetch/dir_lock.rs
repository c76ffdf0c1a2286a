//! Locks of directories, which several workers of a host share.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Locks the directory `dir`, which is created if it does not exist. Returns `None` if another
/// process has the lock or has just removed the directory.
pub(super) fn lock_dir(dir: &Path, lock: fn(&File) -> Result<(), TryLockError>) -> io::Result<Option<File>> {
    fs::create_dir_all(dir)?;
    let gone = |error: io::Error| match error.kind() {
        ErrorKind::NotFound => Ok(None),
        _ => Err(error),
    };
    let file = match File::open(dir) {
        Ok(file) => file,
        Err(error) => return gone(error),
    };
    match lock(&file) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let locked = file.metadata()?;
    match fs::metadata(dir) {
        Ok(current) => Ok(((current.dev(), current.ino()) == (locked.dev(), locked.ino())).then_some(file)),
        Err(error) => gone(error),
    }
}
