//! Connections to the database.

use std::path::Path;
use std::time::Duration;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Connection, SqlSafeStr, SqliteConnection, SqliteTransaction};

/// Connections that read at the same time.
const MAX_READ_CONNECTIONS: u32 = 4;
/// How long another connection may keep the database to itself, as it does to move the log into the database.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);

/// The connections that write. Whoever has them is the only writer, so neither ever waits for the other.
#[derive(Debug)]
pub(super) struct Writers {
    /// A commit waits for the disk: what was answered survives a loss of power.
    pub(super) lifecycle: Writer,
    /// For steps and times of use, which are many and not worth waiting for the disk. They survive the end of the process
    /// however it comes, and a loss of power once the other connection has committed or the log was moved.
    pub(super) relaxed: Writer,
}

impl Writers {
    /// Connects to the database at `path`, and makes it if it is not there.
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

    /// A transaction with the right to write from its start.
    pub(super) async fn begin(&mut self) -> sqlx::Result<SqliteTransaction<'_>> {
        // SQLite ends a transaction by itself when the disk is full. sqlx does not see that, and would never again begin
        // one on this connection. The ping lets a rollback that is under way finish.
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
        // As for a writer: a connection that takes a failed transaction for open would show the past for ever.
        .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }))
        .connect_lazy_with(options(path).read_only(true))
}

/// A connection to the database at `path` that only reads, also what is still in the log.
pub(super) async fn read_only(path: &Path) -> sqlx::Result<SqliteConnection> {
    SqliteConnection::connect_with(&options(path).read_only(true)).await
}

/// A connection that reads the file at `path` alone, without its log, and makes no file.
pub(super) async fn without_log(path: &Path) -> sqlx::Result<SqliteConnection> {
    SqliteConnection::connect_with(&options(path).read_only(true).immutable(true)).await
}

/// The versions of the database. `sqlx::migrate!` would do the same, and build the whole of SQLite a second time for it.
pub(super) fn migrations() -> Migrator {
    let migration = |version, name: &'static str, sql: &'static str| {
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    Migrator::with_migrations(vec![
        migration(1, "store", include_str!("../../migrations/1_store.sql")),
        migration(2, "needs", include_str!("../../migrations/2_needs.sql")),
        migration(3, "owner", include_str!("../../migrations/3_owner.sql")),
        migration(4, "wal", include_str!("../../migrations/4_wal.sql")),
    ])
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(path).foreign_keys(true).busy_timeout(BUSY_TIMEOUT)
}
