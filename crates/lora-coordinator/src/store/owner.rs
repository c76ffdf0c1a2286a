//! Which database the files in `objects/` belong to.
//!
//! The database has a random id and a revision, which each transaction raises that opens the store,
//! takes a file in, removes the row of a file or adds a job. `objects/owner.json` has a copy of
//! both, written after the commit. A database with another id, or with a lower revision than the
//! copy, may lack rows of files that are there, and must not remove them. It may also have rows of
//! files that are gone.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection, SqliteTransaction};
use tokio::fs;

use super::int;

const FILE: &str = "owner.json";
const NEW_FILE: &str = "owner.json.new";

/// The action of a start when the files in `objects/` belong to another database, or to a newer
/// copy of this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ForeignObjects {
    /// Fails and changes nothing.
    Refuse,
    /// Makes the files this database's own.
    Adopt,
}

/// The state of a database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    database: String,
    term: u64,
    revision: u64,
}

/// The reason why a database does not own the files in `objects/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mismatch {
    /// The database is missing, or names no file.
    Empty,
    /// The files belong to another database.
    Other,
    /// The database is older than the files.
    Older {
        /// The database's revision.
        database: u64,
        /// The revision of the database that the files belong to.
        objects: u64,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("is missing or empty"),
            Self::Other => f.write_str("is not the database that stored them"),
            Self::Older { database, objects } => {
                write!(f, "is an older copy of their database: its revision is {database}, theirs {objects}")
            }
        }
    }
}

impl Owner {
    /// The owner that `objects/` names. `None`: the file is missing, or a loss of power damaged it.
    pub(super) async fn read(objects: &Path) -> Option<Self> {
        let path = objects.join(FILE);
        let text = fs::read(&path).await.ok()?;
        let owner = serde_json::from_slice(&text);
        owner.inspect_err(|error| tracing::warn!(path = %path.display(), %error, "ignored")).ok()
    }

    async fn write(&self, objects: &Path) -> std::io::Result<()> {
        let new = objects.join(NEW_FILE);
        fs::write(&new, serde_json::to_vec(self)?).await?;
        // Not synced: after a loss of power the file may lag behind, as it may after a crash.
        fs::rename(&new, objects.join(FILE)).await
    }

    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        let count = |column| row.try_get::<i64, _>(column).map(i64::unsigned_abs);
        Ok(Self { database: row.try_get("database_id")?, term: count("term")?, revision: count("revision")? })
    }
}

/// Whether the files belong to the database; `named` is the owner that `objects/` names.
pub(super) async fn mismatch(
    db: &mut SqliteConnection,
    named: Option<&Owner>,
) -> sqlx::Result<Option<Mismatch>> {
    let row = sqlx::query("SELECT database_id, term, revision FROM coordinator").fetch_one(&mut *db).await?;
    let own = Owner::from_row(&row)?;
    if let Some(named) = named.filter(|named| named.database == own.database) {
        let (database, objects) = (own.revision, named.revision);
        return Ok((database < objects).then_some(Mismatch::Older { database, objects }));
    }
    let knows_files: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM objects)").fetch_one(db).await?;
    Ok(match (knows_files, named) {
        (false, _) => Some(Mismatch::Empty),
        (true, Some(_)) => Some(Mismatch::Other),
        // An earlier version of the coordinator named no owner.
        (true, None) => None,
    })
}

/// Makes the database the owner of the files. It gets another id, so that the former owner is
/// refused from now on, and a term that workers of the former owner accept.
pub(super) async fn adopt(db: &mut SqliteConnection, former: Option<&Owner>) -> sqlx::Result<()> {
    sqlx::query("UPDATE coordinator SET database_id = lower(hex(randomblob(16))), term = MAX(term, ?)")
        .bind(former.map_or(0, |former| int(former.term)))
        .execute(db)
        .await
        .map(drop)
}

/// Commits a transaction that opens the store, takes files in, removes rows of files or adds a job.
pub(super) async fn commit(mut db: SqliteTransaction<'_>, objects: &Path) -> sqlx::Result<()> {
    let row =
        sqlx::query("UPDATE coordinator SET revision = revision + 1 RETURNING database_id, term, revision")
            .fetch_one(&mut *db)
            .await?;
    let owner = Owner::from_row(&row)?;
    db.commit().await?;
    // The transaction is committed: a mark that lags behind only weakens the check.
    if let Err(error) = owner.write(objects).await {
        tracing::warn!(path = %objects.join(FILE).display(), %error, "could not be written");
    }
    Ok(())
}
