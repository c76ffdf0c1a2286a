//! The database that the files in `objects/` belong to.
//!
//! The database has a random id and a revision. The revision is raised by each transaction that
//! opens the store, adds a file, removes the row of a file or adds a job. `objects/owner.json` has
//! a copy of both, written after the commit. A database with another id, or with a lower revision
//! than the copy, may lack rows of existing files, and must not remove these files. It may also
//! have rows of files that no longer exist.

use std::collections::HashSet;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqliteRow;
use sqlx::{Connection, Row, SqliteConnection, SqliteTransaction};
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt;

use super::connections::{self, Writer};
use super::int;
use super::unreferenced::delete_unreferenced;

const OWNER_FILE: &str = "owner.json";
const NEW_OWNER_FILE: &str = "owner.json.new";
/// A time after all others.
const AFTER_ALL_TIMES: i64 = i64::MAX;

/// What a start does if the files in `objects/` do not belong to the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ForeignObjects {
    /// The start fails, and leaves the database and the files unchanged.
    Refuse,
    /// The database becomes the owner of the files.
    Adopt,
}

/// The identity and the progress of a database, as stored in `objects/owner.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    database: String,
    term: u64,
    revision: u64,
    /// A lower bound of `wal_checkpoints_started` in the database's file; 0 if not known.
    #[serde(default)]
    pub(super) wal_checkpoints_completed: u64,
}

/// The reason why a database does not own the files in `objects/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mismatch {
    /// The database's file is missing or empty.
    NoDatabase,
    /// The database lists no files, and `objects/` names no owner.
    ListsNone,
    /// The files belong to another database.
    Other,
    /// The database is older than the files.
    Older {
        /// The database's revision.
        database: u64,
        /// The revision of the database that the files belong to.
        objects: u64,
    },
    /// The database lists files, but `objects/` has none, and its owner file is missing or names
    /// another database or a newer revision.
    NoObjects,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDatabase => f.write_str("is missing or empty"),
            Self::ListsNone => f.write_str("lists none of them"),
            Self::Other => f.write_str("is not the database that stored them"),
            Self::Older { database, objects } => {
                write!(f, "is an older copy of their database: its revision is {database}, theirs {objects}")
            }
            Self::NoObjects => f.write_str("lists files that are all missing"),
        }
    }
}

impl Owner {
    /// Reads the owner that `objects/` names. `None` if there is none, as in a directory of an
    /// earlier version.
    pub(super) async fn read(objects: &Path) -> io::Result<Option<Self>> {
        let text = match fs::read(objects.join(OWNER_FILE)).await {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let corrupt = |error| {
            let message = format!(
                "is corrupt: {error}; remove it if coordinator.db is the newest copy of the database"
            );
            io::Error::new(ErrorKind::InvalidData, message)
        };
        serde_json::from_slice(&text).map(Some).map_err(corrupt)
    }

    /// Writes this owner to `objects/`.
    pub(super) async fn write(&self, objects: &Path) -> io::Result<()> {
        let new = objects.join(NEW_OWNER_FILE);
        let mut file = File::create(&new).await?;
        file.write_all(&serde_json::to_vec(self)?).await?;
        // A tokio file reports a failed write only at the next call.
        file.flush().await?;
        // The rename must not reach the disk before the content.
        file.sync_all().await?;
        fs::rename(&new, path(objects)).await
    }

    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self {
            database: row.try_get("database_id")?,
            term: count(row, "term")?,
            revision: count(row, "revision")?,
            wal_checkpoints_completed: count(row, "wal_checkpoints_completed")?,
        })
    }
}

/// The path of the file that names the owner.
pub(super) fn path(objects: &Path) -> PathBuf {
    objects.join(OWNER_FILE)
}

/// The id of a database, and the revision of this copy.
#[derive(Debug)]
struct Identity {
    database: String,
    revision: u64,
}

/// The facts about a database that decide whether it owns the files. They are read before the
/// database is migrated.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// `None` for a database of an earlier version, which has no id.
    identity: Option<Identity>,
    wal_checkpoints_started: u64,
    /// Whether the database has a row of a file.
    pub(super) lists_objects: bool,
}

impl Contents {
    /// Reads the contents, including the changes in the log if `wal_is_left`. Does not change the
    /// database.
    pub(super) async fn read(database: &Path, wal_is_left: bool) -> sqlx::Result<Self> {
        match wal_is_left {
            true => Self::through(connections::read_only(database).await?).await,
            false => Self::of_file(database).await,
        }
    }

    /// Reads the contents of the file itself, without the changes in the log. No other connection
    /// may be open.
    pub(super) async fn of_file(database: &Path) -> sqlx::Result<Self> {
        Self::through(connections::without_log(database).await?).await
    }

    async fn through(mut db: SqliteConnection) -> sqlx::Result<Self> {
        let found = Self::from_database(&mut db).await;
        db.close().await?;
        found
    }

    async fn from_database(db: &mut SqliteConnection) -> sqlx::Result<Self> {
        let tables =
            "SELECT COUNT(*) FROM sqlite_schema WHERE type = 'table' AND name IN ('coordinator', 'objects')";
        if sqlx::query_scalar::<_, i64>(tables).fetch_one(&mut *db).await? < 2 {
            return Ok(Self::default());
        }
        let lists_objects =
            sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM objects)").fetch_one(&mut *db).await?;
        let row = sqlx::query("SELECT * FROM coordinator").fetch_one(db).await?;
        let has = |column| row.try_get_raw(column).is_ok();
        let identity = match has("database_id") {
            true => {
                Some(Identity { database: row.try_get("database_id")?, revision: count(&row, "revision")? })
            }
            false => None,
        };
        let wal_checkpoints_started =
            if has("wal_checkpoints_started") { count(&row, "wal_checkpoints_started")? } else { 0 };
        Ok(Self { identity, wal_checkpoints_started, lists_objects })
    }

    /// Whether this is the file of the database `named`, and not a copy that is older than the last
    /// checkpoint of its log.
    pub(super) fn has_wal_checkpoints_of(&self, named: &Owner) -> bool {
        let is_named = self.identity.as_ref().is_some_and(|own| own.database == named.database);
        is_named && self.wal_checkpoints_started >= named.wal_checkpoints_completed
    }

    /// The reason why the database does not own the files in `objects/`, if it does not. `named` is
    /// the owner that `objects/` names.
    pub(super) fn mismatch(&self, named: Option<&Owner>, holds_objects: bool) -> Option<Mismatch> {
        if !holds_objects && !self.lists_objects {
            return None;
        }
        let mismatch = match (&self.identity, named) {
            (Some(own), Some(named)) if own.database == named.database => {
                let (database, objects) = (own.revision, named.revision);
                (database < objects).then_some(Mismatch::Older { database, objects })
            }
            (_, Some(_)) => Some(Mismatch::Other),
            (_, None) if !self.lists_objects => Some(Mismatch::ListsNone),
            (_, None) if !holds_objects => Some(Mismatch::NoObjects),
            // An earlier version of the coordinator named no owner.
            (_, None) => None,
        };
        match holds_objects {
            true => mismatch,
            false => mismatch.map(|_| Mismatch::NoObjects),
        }
    }
}

/// Makes the database the owner of exactly the files that are in `objects/`.
///
/// The database gets a new id, so that the former owner is refused from now on, and a term that
/// workers of the former owner accept. Rows of files that no job names are removed, but not the
/// files themselves, which the former owner may need. The time until files without a row are
/// removed starts again. Rows of checkpoints without a file are removed, so that a job resumes from
/// its newest remaining checkpoint.
pub(super) async fn adopt(
    writer: &mut Writer,
    former: Option<&Owner>,
    files: &HashSet<Vec<u8>>,
) -> sqlx::Result<()> {
    let mut db = writer.begin().await?;
    sqlx::query(
        "UPDATE coordinator \
         SET database_id = lower(hex(randomblob(16))), term = MAX(term, ?), wal_checkpoints_completed = 0",
    )
    .bind(former.map_or(0, |former| int(former.term)))
    .execute(&mut *db)
    .await?;
    let checkpoints = "SELECT DISTINCT sha256 FROM checkpoints";
    let checkpoints: Vec<Vec<u8>> = sqlx::query_scalar(checkpoints).fetch_all(&mut *db).await?;
    for lost in checkpoints.iter().filter(|sha256| !files.contains(*sha256)) {
        sqlx::query("DELETE FROM checkpoints WHERE sha256 = ?").bind(lost).execute(&mut *db).await?;
    }
    delete_unreferenced(&mut db, AFTER_ALL_TIMES).await?;
    sqlx::query("DELETE FROM unknown_objects").execute(&mut *db).await?;
    db.commit().await
}

/// Commits a transaction that opens the store, adds files, removes rows of files or adds a job.
/// Returns the owner that `objects/` must name from now on.
pub(super) async fn commit_revision(mut db: SqliteTransaction<'_>) -> sqlx::Result<Owner> {
    sqlx::query("UPDATE coordinator SET revision = revision + 1").execute(&mut *db).await?;
    commit_unchanged(db).await
}

/// Commits a transaction that adds files, removes rows of files or adds a job, and writes the owner
/// to `objects`.
pub(super) async fn commit(db: SqliteTransaction<'_>, objects: &Path) -> sqlx::Result<()> {
    name(&commit_revision(db).await?, objects).await;
    Ok(())
}

/// Commits a transaction that does not affect which files a database must know, without raising the
/// revision: an older copy remains as valid as a newer one.
pub(super) async fn commit_same_revision(db: SqliteTransaction<'_>, objects: &Path) -> sqlx::Result<()> {
    name(&commit_unchanged(db).await?, objects).await;
    Ok(())
}

async fn commit_unchanged(mut db: SqliteTransaction<'_>) -> sqlx::Result<Owner> {
    let owner = Owner::from_row(&sqlx::query("SELECT * FROM coordinator").fetch_one(&mut *db).await?)?;
    db.commit().await?;
    Ok(owner)
}

/// Writes the owner after a commit. If the write fails, an older copy of the database may be
/// accepted until a later commit writes the owner. The database itself is still accepted: only a
/// start changes its id, and such a start fails if it cannot write the owner.
async fn name(owner: &Owner, objects: &Path) {
    if let Err(error) = owner.write(objects).await {
        tracing::warn!(path = %path(objects).display(), %error, "cannot record the owner of the files");
    }
}

fn count(row: &SqliteRow, column: &str) -> sqlx::Result<u64> {
    row.try_get::<i64, _>(column).map(i64::unsigned_abs)
}
