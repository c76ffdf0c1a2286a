//! The write-ahead log of the database, `coordinator.db-wal`.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tokio::fs;

/// Bytes of a log without a page.
const LOG_HEADER: u64 = 32;

/// The path of a database's log.
pub(super) fn log_path(database: &Path) -> PathBuf {
    database.with_file_name("coordinator.db-wal")
}

/// Whether a log with pages in it is beside the database.
pub(super) async fn is_left(database: &Path) -> io::Result<bool> {
    match fs::metadata(log_path(database)).await {
        Ok(log) => Ok(log.len() > LOG_HEADER),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
