//! The write-ahead log of the database, `coordinator.db-wal`.
//!
//! A killed coordinator leaves a log. SQLite does not check that a log was written for the file
//! beside it: if that file has been replaced by a copy, SQLite replays the log into the copy, and
//! the pages of both mix. Two facts show that the file was replaced:
//!
//! - A copy made by `VACUUM INTO` is not in WAL mode until a coordinator opens it.
//! - A copy has a lower `wal_checkpoints_started` than `objects/owner.json` has as
//!   `wal_checkpoints_completed`. A checkpoint of SQLite moves the log into the file. The
//!   coordinator makes one at its start and every ten minutes; it raises the first counter before
//!   the checkpoint and writes the second one after it.
//!
//! Not detected: a copy of the file's pages (`cp`, `.backup`) that was made after the last
//! checkpoint; any copy of the pages if `owner.json` is missing; and a copy that another program,
//! such as the `sqlite3` shell, has opened beside the log before.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tokio::fs::{self, File};
use tokio::io::AsyncReadExt;

use super::connections::Writer;
use super::owner::{self, Contents, Owner};

/// The file name of the log.
pub(super) const FILE: &str = "coordinator.db-wal";
/// The number of bytes of a log without pages.
const HEADER_BYTES: u64 = 32;
/// The offset of the byte for the read version in a database's file.
const READ_VERSION: usize = 19;
/// The read version of a database in WAL mode.
const WAL_MODE: u8 = 2;

/// The path of a database's log.
pub(super) fn path(database: &Path) -> PathBuf {
    database.with_file_name(FILE)
}

/// Whether a log with pages exists beside the database.
pub(super) async fn is_left(database: &Path) -> io::Result<bool> {
    match fs::metadata(path(database)).await {
        Ok(log) => Ok(log.len() > HEADER_BYTES),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the log beside the database was written for another file; `named` is the owner that
/// `objects/` names.
pub(super) async fn is_foreign(database: &Path, named: Option<&Owner>) -> io::Result<bool> {
    let mut header = Vec::new();
    File::open(database).await?.take(READ_VERSION as u64 + 1).read_to_end(&mut header).await?;
    if header.get(READ_VERSION) != Some(&WAL_MODE) {
        return Ok(true);
    }
    let Some(named) = named.filter(|named| named.wal_checkpoints_completed > 0) else { return Ok(false) };
    match Contents::of_file(database).await {
        Ok(found) => Ok(!found.has_wal_checkpoints_of(named)),
        // A copy is always a complete database. A file without a complete database was left by a
        // crash during a checkpoint; SQLite completes this file from the log.
        Err(error) => {
            tracing::warn!(path = %database.display(), %error, "cannot read the database without its log");
            Ok(false)
        }
    }
}

/// Moves the log into the database's file, as far as readers allow, and records a complete
/// checkpoint.
pub(super) async fn checkpoint(writer: &mut Writer, objects: &Path) -> sqlx::Result<()> {
    let mut db = writer.begin().await?;
    sqlx::query("UPDATE coordinator SET wal_checkpoints_started = wal_checkpoints_started + 1")
        .execute(&mut *db)
        .await?;
    db.commit().await?;
    let moved = sqlx::query_as("PRAGMA wal_checkpoint(PASSIVE)").fetch_one(&mut writer.connection).await?;
    let (busy, pages, moved): (i64, i64, i64) = moved;
    if busy != 0 || moved < pages {
        return Ok(());
    }
    let mut db = writer.begin().await?;
    sqlx::query("UPDATE coordinator SET wal_checkpoints_completed = wal_checkpoints_started")
        .execute(&mut *db)
        .await?;
    owner::commit_same_revision(db, objects).await
}

/// Moves the log into the database's file and empties it. Returns whether this succeeded.
pub(super) async fn truncate(writer: &mut Writer) -> sqlx::Result<bool> {
    let moved = sqlx::query_as("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(&mut writer.connection).await?;
    let (busy, _, _): (i64, i64, i64) = moved;
    Ok(busy == 0)
}
