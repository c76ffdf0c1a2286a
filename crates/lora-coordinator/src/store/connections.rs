//! Connections to the database.

use std::path::Path;
use std::time::Duration;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Connection, SqlSafeStr, SqliteConnection, SqliteTransaction};

/// The largest number of connections that read at the same time.
const MAX_READ_CONNECTIONS: u32 = 4;
/// The time to wait for another connection that has locked the database, for example to move the
/// log into the database.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);

/// The connections that write. They are locked together, so that neither waits for the other.
#[derive(Debug)]
pub(super) struct Writers {
    /// The connection whose commits wait for the disk: a committed change survives a loss of power.
    pub(super) lifecycle: Writer,
    /// The connection for steps and times of use, which are too frequent to wait for the disk. They
    /// survive a kill of the process, and a loss of power once `lifecycle` has committed or the log
    /// was moved.
    pub(super) relaxed: Writer,
}

impl Writers {
    /// Connects to the database at `path`, and creates it if it does not exist.
    pub(super) async fn connect(path: &Path) -> sqlx::Result<Self> {
        let options = options(path).create_if_missing(true).journal_mode(SqliteJournalMode::Wal);
        let lifecycle = Writer::connect(options.clone().synchronous(SqliteSynchronous::Full)).await?;
        let relaxed = Writer::connect(options.synchronous(SqliteSynchronous::Normal)).await?;
        Ok(Self { lifecycle, relaxed })
    }
}

/// A connection that writes.
#[derive(Debug)]
pub(super) struct Writer {
    options: SqliteConnectOptions,
    pub(super) connection: SqliteConnection,
}

impl Writer {
    async fn connect(options: SqliteConnectOptions) -> sqlx::Result<Self> {
        Ok(Self { connection: SqliteConnection::connect_with(&options).await?, options })
    }

    /// Begins a transaction that has the write lock from its start.
    pub(super) async fn begin(&mut self) -> sqlx::Result<SqliteTransaction<'_>> {
        // If the disk is full, SQLite ends a transaction by itself. sqlx does not notice this, and
        // could not begin another transaction on this connection. The ping waits for a pending
        // rollback.
        let usable = self.connection.ping().await.is_ok() && !self.connection.is_in_transaction();
        if !usable {
            self.connection = SqliteConnection::connect_with(&self.options).await?;
        }
        self.connection.begin_with("BEGIN IMMEDIATE").await
    }
}

/// Connections to the database at `path` that only read.
pub(super) fn readers(path: &Path) -> SqlitePool {
    SqlitePoolOptions::new()
        .max_connections(MAX_READ_CONNECTIONS)
        // As for a writer: a connection that sqlx takes to be in a failed transaction would read
        // the same old state forever.
        .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }))
        .connect_lazy_with(options(path).read_only(true))
}

/// A read-only connection to the database at `path`, including the changes in its log.
pub(super) async fn read_only(path: &Path) -> sqlx::Result<SqliteConnection> {
    SqliteConnection::connect_with(&options(path).read_only(true)).await
}

/// A read-only connection to the file at `path` without its log. Creates no file.
pub(super) async fn without_log(path: &Path) -> sqlx::Result<SqliteConnection> {
    SqliteConnection::connect_with(&options(path).read_only(true).immutable(true)).await
}

/// The migrations of the database. `sqlx::migrate!` would give the same, but compile SQLite a
/// second time.
pub(super) fn migrations() -> Migrator {
    let migration = |version, name: &'static str, sql: &'static str| {
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    Migrator::with_migrations(vec![
        migration(1, "store", include_str!("../../migrations/1_store.sql")),
        migration(2, "needs", include_str!("../../migrations/2_needs.sql")),
        migration(3, "owner", include_str!("../../migrations/3_owner.sql")),
        migration(4, "wal", include_str!("../../migrations/4_wal.sql")),
        migration(5, "exported", include_str!("../../migrations/5_exported.sql")),
    ])
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(path).foreign_keys(true).busy_timeout(BUSY_TIMEOUT)
}
