//! What outlives the process: a database, and the files that it names.
//!
//! ```text
//! <state_dir>/lock               held by the one process that writes here
//! <state_dir>/coordinator.db     jobs, their events and steps, and which files there are (SQLite)
//! <state_dir>/coordinator.db-wal changes to the database that are not in its file yet
//! <state_dir>/objects/<sha256>   files, each content once
//! <state_dir>/objects/owner.json the database that the files belong to
//! <state_dir>/staging/           files on their way in; emptied at every start
//! ```
//!
//! - What a method has written is on disk when it returns, steps aside: those are once the next other thing is.
//! - One writer at a time. It moves a file to `objects/` before it commits the row that names it, and removes a file after
//!   it has committed that no row does. So every row has its file. A file without a row is what a crash left, or was stored
//!   with another database. A start fails on the files of another database, and a file without a row is kept for a time.
//! - A start also fails on the log of another database, and if none of the files is there that the
//!   database lists.
//! - Reading never waits for a writer, and sees only what is committed.

mod artifacts;
mod connections;
mod job_row;
mod jobs;
mod log;
mod objects;
mod owner;
#[cfg(test)]
mod tests;
mod unknown_objects;
mod wal;
mod watch;

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use sqlx::migrate::MigrateError;
use sqlx::sqlite::SqlitePool;
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;

pub(crate) use artifacts::CommitOutcome;
pub(crate) use job_row::{JobRow, MemberRow};
pub(crate) use jobs::InsertOutcome;
pub(crate) use objects::Staged;
pub(crate) use owner::ForeignObjects;
pub(crate) use unknown_objects::UnknownObjects;
pub(crate) use watch::WatchError;

use connections::Writers;
use owner::{Contents, Mismatch, Owner};
use watch::Watchers;

const LOCK: &str = "lock";
const DATABASE: &str = "coordinator.db";
const OBJECTS: &str = "objects";
const STAGING: &str = "staging";

/// Rows that are kept of each job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retention {
    /// Lifecycle events; the newest is kept in any case.
    pub(crate) events: u64,
    /// Steps; the newest is kept in any case.
    pub(crate) steps: u64,
}

/// What is wrong with the store.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// Another process writes there.
    #[error("{dir} is in use by another coordinator", dir = .0.display())]
    InUse(PathBuf),
    /// The files in `objects/` belong to another database, or to a newer copy of this one.
    #[error(
        "{objects} holds files, but {database} {mismatch}; restore the newest copy of the database \
         (remove coordinator.db-wal and coordinator.db-shm first), set state_dir to another \
         directory, or start once with adopt_objects=true: files without a row in the database are \
         then removed after limits.unknown_object_hours",
        objects = objects.display(), database = database.display()
    )]
    NotOwner {
        /// The files' directory.
        objects: PathBuf,
        /// The database's file.
        database: PathBuf,
        /// Why the files are not the database's.
        mismatch: Mismatch,
    },
    /// The database lists files, and none is there: `objects/` is not mounted, or was emptied.
    #[error(
        "{objects} holds no files, but {database} lists some; mount or restore the directory, set \
         state_dir to another directory, or start once with adopt_objects=true: lost files must then \
         be uploaded again",
        objects = objects.display(),
        database = database.display()
    )]
    NoObjects {
        /// The files' directory.
        objects: PathBuf,
        /// The database's file.
        database: PathBuf,
    },
    /// The log beside the database was written for another file.
    #[error(
        "{log} was written for another copy of {database}; remove coordinator.db-wal and \
         coordinator.db-shm if the database was restored, or put back the file that they were \
         written for",
        log = wal::path(.0).display(), database = .0.display()
    )]
    ForeignWal(PathBuf),
    /// The file system refuses, for want of space for instance.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the file system says.
        source: io::Error,
    },
    /// The database refuses: no space is left, or the file is damaged.
    #[error("{path}: {source}", path = path.display())]
    Database {
        /// The database's file.
        path: PathBuf,
        /// What the database says.
        source: sqlx::Error,
    },
    /// The database is another version's.
    #[error("{path} cannot be brought to this version: {source}", path = path.display())]
    Migrate {
        /// The database's file.
        path: PathBuf,
        /// Why not.
        source: MigrateError,
    },
    /// Something is not as it was written, or as it was announced.
    #[error("{0}")]
    Damaged(String),
    /// The work was cut off, because the process ends.
    #[error("the store's work was cut off: {0}")]
    CutOff(#[from] JoinError),
}

/// The coordinator's store. Clones are handles of the same.
#[derive(Debug, Clone)]
pub(crate) struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    objects: PathBuf,
    staging: PathBuf,
    database: PathBuf,
    term: u64,
    retention: Retention,
    writers: Mutex<Writers>,
    readers: SqlitePool,
    watchers: Watchers,
    /// Files that were staged so far.
    staged: AtomicU64,
    closed: CancellationToken,
    /// Held open for its lock, and given up last.
    _lock: File,
}

impl Store {
    /// Opens the store in `state_dir`, makes it if it is not there, and raises the term.
    ///
    /// # Errors
    /// The directory is in use or not to be written, or the database is damaged or a newer
    /// version's, or does not own the files and `foreign` refuses them.
    pub(crate) async fn open(
        state_dir: &Path,
        retention: Retention,
        foreign: ForeignObjects,
    ) -> Result<Self, StoreError> {
        let (objects, staging) = (state_dir.join(OBJECTS), state_dir.join(STAGING));
        create_private(state_dir)?;
        let lock = lock(state_dir)?;
        create_private(&objects)?;
        let database = state_dir.join(DATABASE);
        let mut writers = open_database(&database, &objects, foreign).await?;
        let failed = |source| StoreError::Database { path: database.clone(), source };
        let mut db = writers.lifecycle.begin().await.map_err(failed)?;
        let term = sqlx::query_scalar("UPDATE coordinator SET term = term + 1 RETURNING term");
        let term = term.fetch_one(&mut *db).await.map_err(failed)?;
        let owner = owner::commit_revision(db).await.map_err(failed)?;
        owner.write(&objects).await.map_err(io_error(&owner::path(&objects)))?;
        wal::checkpoint(&mut writers.lifecycle, &objects).await.map_err(failed)?;

        if staging.symlink_metadata().is_ok() {
            std::fs::remove_dir_all(&staging).map_err(io_error(&staging))?;
        }
        create_private(&staging)?;
        Ok(Self(Arc::new(Inner {
            objects,
            staging,
            readers: connections::readers(&database),
            database,
            term,
            retention,
            writers: Mutex::new(writers),
            watchers: Watchers::default(),
            staged: AtomicU64::new(0),
            closed: CancellationToken::new(),
            _lock: lock,
        })))
    }

    /// How often the store was opened, this time included.
    pub(crate) fn term(&self) -> u64 {
        self.0.term
    }

    /// A directory for passing things, emptied at every start.
    pub(crate) fn staging_dir(&self) -> &Path {
        &self.0.staging
    }

    /// Moves the database's log into its file as far as its readers allow.
    pub(crate) async fn checkpoint_wal(&self) -> Result<(), StoreError> {
        let mut writers = self.writers().await;
        let moved = wal::checkpoint(&mut writers.lifecycle, &self.0.objects).await;
        moved.map_err(|error| self.database_error(error))
    }

    /// Ends reading, and moves all of the database's log into its file.
    pub(crate) async fn finish(&self) -> Result<(), StoreError> {
        self.readers().close().await;
        let mut writers = self.writers().await;
        wal::truncate(&mut writers.lifecycle).await.map_err(|error| self.database_error(error))
    }

    /// Ends every watch, and every later one.
    pub(crate) fn close(&self) {
        self.0.closed.cancel();
    }

    async fn writers(&self) -> MutexGuard<'_, Writers> {
        self.0.writers.lock().await
    }

    fn readers(&self) -> &SqlitePool {
        &self.0.readers
    }

    /// An error of the database with its name.
    fn database_error(&self, source: sqlx::Error) -> StoreError {
        StoreError::Database { path: self.0.database.clone(), source }
    }
}

/// Makes sure that the database owns the files in `objects`, connects to it, and brings it to this
/// version.
async fn open_database(
    database: &Path,
    objects: &Path,
    foreign: ForeignObjects,
) -> Result<Writers, StoreError> {
    let failed = |source| StoreError::Database { path: database.to_owned(), source };
    let named = Owner::read(objects).await.map_err(io_error(&owner::path(objects)))?;
    let mismatch = find_mismatch(database, objects, named.as_ref()).await?;
    if let Some(mismatch) = mismatch.filter(|_| foreign == ForeignObjects::Refuse) {
        let (objects, database) = (objects.to_owned(), database.to_owned());
        return Err(match mismatch {
            Mismatch::NoObjects => StoreError::NoObjects { objects, database },
            mismatch => StoreError::NotOwner { objects, database, mismatch },
        });
    }
    let mut writers = Writers::connect(database).await.map_err(failed)?;
    let outdated = |source| StoreError::Migrate { path: database.to_owned(), source };
    connections::migrations().run(&mut writers.lifecycle.connection).await.map_err(outdated)?;
    if let Some(mismatch) = mismatch {
        let files = unknown_objects::object_files(objects).await.map_err(io_error(objects))?;
        owner::adopt(&mut writers.lifecycle, named.as_ref(), &files).await.map_err(failed)?;
        let (database, objects) = (database.display(), objects.display());
        tracing::warn!(%database, %objects, "the database {mismatch}; the files are its own from now on");
    } else if foreign == ForeignObjects::Adopt {
        tracing::warn!("adopt_objects is set, but the files belong to this database already; unset it");
    }
    Ok(writers)
}

/// The reason why the database does not own the files in `objects`, before anything is changed:
/// another copy that is restored afterwards must not meet the log of this one, and an earlier
/// version must still be able to open a copy that is refused.
async fn find_mismatch(
    database: &Path,
    objects: &Path,
    named: Option<&Owner>,
) -> Result<Option<Mismatch>, StoreError> {
    let holds_objects = unknown_objects::holds_objects(objects).await.map_err(io_error(objects))?;
    if !database.metadata().is_ok_and(|file| file.len() > 0) {
        return Ok(holds_objects.then_some(Mismatch::NoDatabase));
    }
    let wal_is_left = wal::is_left(database).await.map_err(io_error(database))?;
    if wal_is_left && wal::is_foreign(database, named).await.map_err(io_error(database))? {
        return Err(StoreError::ForeignWal(database.to_owned()));
    }
    let found = Contents::read(database, wal_is_left).await;
    let found = found.map_err(|source| StoreError::Database { path: database.to_owned(), source })?;
    let mismatch = found.mismatch(named, holds_objects);
    if mismatch.is_none() && found.lists_objects && !holds_objects {
        let (database, objects) = (database.display(), objects.display());
        tracing::warn!(%database, %objects, "the database lists files that are all missing");
    }
    Ok(mismatch)
}

/// Makes a directory, and those above it, that others cannot look into: it holds people's data and the groups' tokens.
fn create_private(dir: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error(dir))
}

fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join(LOCK);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(io_error(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse(dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(StoreError::Io { path, source }),
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> StoreError + '_ {
    |source| StoreError::Io { path: path.to_owned(), source }
}

/// A number for the database, which has signed ones. What exceeds them is no honest count, and becomes the largest.
fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
