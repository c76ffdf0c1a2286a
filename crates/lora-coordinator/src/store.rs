//! The persistent state of the coordinator: a database, and the files that it names.
//!
//! ```text
//! <state_dir>/lock               locked by the one process that writes here
//! <state_dir>/coordinator.db     jobs, events, steps and the list of files (SQLite)
//! <state_dir>/coordinator.db-wal changes to the database that are not in its file yet
//! <state_dir>/objects/<sha256>   files, each content once
//! <state_dir>/objects/owner.json the database that the files belong to
//! <state_dir>/tokens/            tokens of datasets; they can be made again
//! <state_dir>/staging/           uploads in progress; emptied at every start
//! ```
//!
//! - When a method returns, everything that it wrote is on disk, except for steps: those are on
//!   disk after the next commit of something else.
//! - There is one writer at a time. A file is moved to `objects/` before the row that names it is
//!   committed, and removed after the removal of its row is committed. Every row therefore has its
//!   file. A file without a row was left by a crash, or was stored with another database. A start
//!   fails if the files belong to another database. A file without a row is kept for some time.
//! - A start also fails if the log was written for another database, or if all files that the
//!   database lists are missing.
//! - Reading never waits for a writer, and sees only committed changes.

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
mod unreferenced;
mod wal;
mod watch;

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lora_data::TokenCache;
use sqlx::migrate::MigrateError;
use sqlx::sqlite::SqlitePool;
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use artifacts::ArtifactRefusal;
pub(crate) use job_row::{JobRow, MemberRow};
pub(crate) use jobs::InsertOutcome;
pub(crate) use log::Recorded;
pub(crate) use objects::StagedFile;
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
const TOKENS: &str = "tokens";
/// The largest size of all files of tokens that are kept for later jobs.
const MAX_TOKEN_BYTES: u64 = 2 << 30;

/// The number of rows that are kept for each job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retention {
    /// Lifecycle events; the newest is kept in any case.
    pub(crate) events: u64,
    /// Steps; the newest is kept in any case.
    pub(crate) steps: u64,
}

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// Another process has locked the directory.
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
        /// The directory of the files.
        objects: PathBuf,
        /// The database's file.
        database: PathBuf,
        /// Why the files do not belong to the database.
        mismatch: Mismatch,
    },
    /// All files that the database lists are missing: `objects/` is not mounted, or was emptied.
    #[error(
        "{objects} holds no files, but {database} lists some; mount or restore the directory, set \
         state_dir to another directory, or start once with adopt_objects=true: lost files must then \
         be uploaded again",
        objects = objects.display(),
        database = database.display()
    )]
    NoObjects {
        /// The directory of the files.
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
    /// A file operation failed, for example because the disk is full.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// An operation of the database failed: the disk is full, or the file is corrupt.
    #[error("{path}: {source}", path = path.display())]
    Database {
        /// The database's file.
        path: PathBuf,
        /// The error of the database.
        source: sqlx::Error,
    },
    /// The migration of the database to this version failed, for example because a newer version
    /// has written it.
    #[error("{path} cannot be migrated to this version: {source}", path = path.display())]
    Migrate {
        /// The database's file.
        path: PathBuf,
        /// The error of the migration.
        source: MigrateError,
    },
    /// Data is invalid, for example because it differs from its announced size or hash.
    #[error("{0}")]
    Invalid(String),
    /// A task of the store was aborted, because the process ends.
    #[error("a task of the store was aborted: {0}")]
    CutOff(#[from] JoinError),
}

/// The coordinator's store. Clones are handles of the same store.
#[derive(Debug, Clone)]
pub(crate) struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    objects: PathBuf,
    staging: PathBuf,
    tokens: TokenCache,
    database: PathBuf,
    term: u64,
    retention: Retention,
    writers: Mutex<Writers>,
    readers: SqlitePool,
    watchers: Watchers,
    /// The number of files that were staged since the start.
    staged: AtomicU64,
    closed: CancellationToken,
    /// The work that ends even if its caller is gone.
    work: TaskTracker,
    /// The open lock file. It is the last field, so that the lock is released last.
    _lock: File,
}

impl Store {
    /// Opens the store in `state_dir`, creates it if it does not exist, and raises the term.
    ///
    /// # Errors
    /// The directory is in use or cannot be written; the database is corrupt or of a newer version;
    /// or the database does not own the files and `foreign` refuses them.
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
            tokens: TokenCache::new(state_dir.join(TOKENS), MAX_TOKEN_BYTES),
            readers: connections::readers(&database),
            database,
            term,
            retention,
            writers: Mutex::new(writers),
            watchers: Watchers::default(),
            staged: AtomicU64::new(0),
            closed: CancellationToken::new(),
            work: TaskTracker::new(),
            _lock: lock,
        })))
    }

    /// The directory of tokens for later jobs.
    pub(crate) fn token_cache(&self) -> &TokenCache {
        &self.0.tokens
    }

    /// The number of times that the store was opened, including this one.
    pub(crate) fn term(&self) -> u64 {
        self.0.term
    }

    /// Moves the database's log into its file, as far as readers allow.
    pub(crate) async fn checkpoint_wal(&self) -> Result<(), StoreError> {
        let mut writers = self.writers().await;
        let moved = wal::checkpoint(&mut writers.lifecycle, &self.0.objects).await;
        moved.map_err(|error| self.database_error(error))
    }

    /// Refuses new reads, and waits for the end of the others and of the commits.
    pub(crate) async fn end_work(&self) {
        self.0.work.close();
        self.0.work.wait().await;
        self.readers().close().await;
    }

    /// Moves the whole log of the database into its file, and empties the log. Returns whether this
    /// succeeded; another connection to the database can prevent it.
    pub(crate) async fn truncate_wal(&self) -> Result<bool, StoreError> {
        let mut writers = self.writers().await;
        wal::truncate(&mut writers.lifecycle).await.map_err(|error| self.database_error(error))
    }

    /// Ends all watches, and each later watch at its start.
    pub(crate) fn close(&self) {
        self.0.closed.cancel();
    }

    async fn writers(&self) -> MutexGuard<'_, Writers> {
        self.0.writers.lock().await
    }

    fn readers(&self) -> &SqlitePool {
        &self.0.readers
    }

    /// Adds the path of the database to its error.
    fn database_error(&self, source: sqlx::Error) -> StoreError {
        StoreError::Database { path: self.0.database.clone(), source }
    }
}

/// Checks that the database owns the files in `objects`, connects to it, and migrates it to this
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
    let not_migrated = |source| StoreError::Migrate { path: database.to_owned(), source };
    connections::migrations().run(&mut writers.lifecycle.connection).await.map_err(not_migrated)?;
    if let Some(mismatch) = mismatch {
        let files = unknown_objects::object_files(objects).await.map_err(io_error(objects))?;
        owner::adopt(&mut writers.lifecycle, named.as_ref(), &files).await.map_err(failed)?;
        let (database, objects) = (database.display(), objects.display());
        tracing::warn!(%database, %objects, %mismatch, "the database has adopted the files");
    } else if foreign == ForeignObjects::Adopt {
        tracing::warn!("adopt_objects is set, but the files already belong to this database; unset it");
    }
    Ok(writers)
}

/// The reason why the database does not own the files in `objects`, if it does not. Changes
/// nothing: a copy that is restored later must not find the log of this one beside it, and an
/// earlier version must still be able to open a database that this version refuses.
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
        tracing::warn!(%database, %objects, "all files that the database lists are missing");
    }
    Ok(mismatch)
}

/// Creates a directory and its parents, which other users cannot read: it contains the data of
/// users and the tokens of groups.
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

/// Converts a number to the signed integers of the database. A larger number cannot be a valid
/// count, and becomes the largest integer.
fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
