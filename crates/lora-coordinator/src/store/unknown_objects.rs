//! Files in `objects/` without a row in the database: they were left by a crash, or stored with
//! another database.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use sqlx::SqliteConnection;
use tokio::fs;

use super::job_row::nanos;
use super::{Store, StoreError, io_error};

/// The result of a search for unknown objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UnknownObjects {
    /// Files that no earlier search found.
    pub(crate) found: usize,
    /// Files that were removed.
    pub(crate) removed: usize,
}

impl Store {
    /// Removes files without a row. A file is removed by the first search that runs `age` after the
    /// search that found it, but not before the file itself has that age.
    pub(crate) async fn remove_unknown_objects(&self, age: Duration) -> Result<UnknownObjects, StoreError> {
        let store = self.clone();
        self.run_to_completion(async move {
            let now = SystemTime::now();
            let horizon = now.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
            // A writer keeps this lock from the move of a file to `objects/` to the commit of its
            // row, so such a file is not taken for an unknown one.
            let mut writers = store.writers().await;
            let failed = |error| store.database_error(error);
            let dir = &store.0.objects;
            let files = object_files(dir).await.map_err(io_error(dir))?;
            let mut db = writers.lifecycle.begin().await.map_err(failed)?;
            let found = record(&mut db, &files, nanos(now)).await.map_err(failed)?;
            let outdated = "SELECT sha256 FROM unknown_objects WHERE found <= ?";
            let outdated: Vec<Vec<u8>> = sqlx::query_scalar(outdated)
                .bind(nanos(horizon))
                .fetch_all(&mut *db)
                .await
                .map_err(failed)?;
            db.commit().await.map_err(failed)?;
            let mut old = Vec::new();
            for sha256 in outdated {
                let Some(path) = store.object_path(&sha256) else { continue };
                let written = fs::metadata(&path).await.and_then(|file| file.modified());
                if written.map_err(io_error(&path))? <= horizon {
                    old.push(sha256);
                }
            }
            Ok(UnknownObjects { found, removed: store.remove(old).await })
        })
        .await
    }
}

/// Whether `dir` has a file with the name of an object.
pub(super) async fn holds_objects(dir: &Path) -> std::io::Result<bool> {
    let mut entries = fs::read_dir(dir).await?;
    while let Some(entry) = entries.next_entry().await? {
        if sha256(&entry).is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The SHA-256s of the files in `dir` that have the name of an object.
pub(super) async fn object_files(dir: &Path) -> std::io::Result<HashSet<Vec<u8>>> {
    let mut files = HashSet::new();
    let mut entries = fs::read_dir(dir).await?;
    while let Some(entry) = entries.next_entry().await? {
        files.extend(sha256(&entry));
    }
    Ok(files)
}

fn sha256(entry: &fs::DirEntry) -> Option<Vec<u8>> {
    let name = entry.file_name();
    let sha256 = hex::decode(name.to_str()?).ok()?;
    // Only lower-case digits name an object.
    (sha256.len() == 32 && *name == *hex::encode(&sha256)).then_some(sha256)
}

/// Updates the table `unknown_objects` to the files that exist. Returns the number of new rows.
async fn record(db: &mut SqliteConnection, files: &HashSet<Vec<u8>>, now: i64) -> sqlx::Result<usize> {
    let known = sqlx::query_scalar("SELECT sha256 FROM objects").fetch_all(&mut *db).await?;
    let known: HashSet<Vec<u8>> = known.into_iter().collect();
    let recorded = sqlx::query_scalar("SELECT sha256 FROM unknown_objects").fetch_all(&mut *db).await?;
    let recorded: HashSet<Vec<u8>> = recorded.into_iter().collect();
    for gone in recorded.iter().filter(|sha256| known.contains(*sha256) || !files.contains(*sha256)) {
        let query = sqlx::query("DELETE FROM unknown_objects WHERE sha256 = ?");
        query.bind(gone).execute(&mut *db).await?;
    }
    let mut found = 0;
    for new in files.iter().filter(|sha256| !known.contains(*sha256) && !recorded.contains(*sha256)) {
        let query = sqlx::query("INSERT INTO unknown_objects (sha256, found) VALUES (?, ?)");
        query.bind(new).bind(now).execute(&mut *db).await?;
        found += 1;
    }
    Ok(found)
}
