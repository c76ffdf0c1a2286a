//! Tests of the store. Each test has its own directory.

mod files;
mod jobs;
mod log;
mod owner;
mod results;
mod unknown_objects;

use std::path::Path;
use std::time::Duration;

use lora_proto::v1::{self, job_event, watch_job_response};
use lora_spec::JobState;
use tempfile::TempDir;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{Connection, SqliteConnection};

use super::*;

const TEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A store in a directory that is removed on drop.
struct Fixture {
    store: Store,
    dir: TempDir,
}

impl Fixture {
    async fn new() -> Self {
        Self::keeping(1000, 1000).await
    }

    async fn keeping(events: u64, steps: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store =
            Store::open(dir.path(), Retention { events, steps }, ForeignObjects::Refuse).await.unwrap();
        Self { store, dir }
    }

    /// Opens the store as a second process would.
    async fn open_again(&self) -> Result<Store, StoreError> {
        Store::open(self.dir.path(), self.store.0.retention, ForeignObjects::Refuse).await
    }

    /// Opens the store again, as after a restart of the process.
    async fn reopened(self) -> Self {
        let Self { store, dir } = self;
        let retention = store.0.retention;
        drop(store);
        Self { store: Store::open(dir.path(), retention, ForeignObjects::Refuse).await.unwrap(), dir }
    }

    async fn add(&self, job: JobRow) -> JobRow {
        match self.store.insert_job(&job, vec![changed(job.state)]).await.unwrap() {
            InsertOutcome::New(job) => job,
            other => panic!("{other:?}"),
        }
    }

    /// A job that workers train in generation 1.
    async fn add_running(&self, id: &str) -> JobRow {
        self.add(JobRow { state: JobState::Running, generation: 1, ..job(id) }).await
    }

    async fn staged(&self, content: &[u8]) -> StagedFile {
        let mut staged = self.store.stage().await.unwrap();
        for piece in content.chunks(3) {
            staged.write(piece).await.unwrap();
        }
        staged.finish().await.unwrap()
    }

    async fn add_input(&self, content: &[u8]) -> v1::FileDigest {
        let staged = self.staged(content).await;
        let digest = staged.digest.clone();
        self.store.commit_input(staged).await.unwrap();
        digest
    }

    async fn commit(
        &self,
        artifact: v1::JobArtifact,
        content: &[u8],
    ) -> (v1::FileDigest, Result<(), ArtifactRefusal>) {
        let checked = self.store.check_artifact(&artifact).await.unwrap();
        let staged = self.staged(content).await;
        let digest = staged.digest.clone();
        let committed = self.store.commit_artifact(&artifact, staged).await.unwrap();
        assert_eq!(checked, committed);
        (digest, committed)
    }

    /// The sorted names of the files in a directory of the store, without `owner.json` and its new
    /// copy that is being written.
    fn names(&self, dir: &str) -> Vec<String> {
        let mut names = names(&self.dir.path().join(dir));
        names.retain(|name| !name.starts_with("owner.json"));
        names
    }

    /// Changes the database over another connection.
    async fn tamper(&self, sql: &'static str) {
        let options = SqliteConnectOptions::new().filename(self.dir.path().join(DATABASE));
        let mut db = SqliteConnection::connect_with(&options).await.unwrap();
        sqlx::query(sql).execute(&mut db).await.unwrap();
        db.close().await.unwrap();
    }

    /// Writes a copy of the current database to `path`.
    async fn vacuum_into(&self, path: &Path) {
        let mut writers = self.store.writers().await;
        let query = sqlx::query("VACUUM INTO ?").bind(path.to_str().unwrap());
        query.execute(&mut writers.lifecycle.connection).await.unwrap();
    }

    /// A directory with the files that a kill of the process would leave now: the log is not moved
    /// into the database.
    fn killed(&self) -> TempDir {
        let killed = tempfile::tempdir().unwrap();
        std::fs::create_dir(killed.path().join(OBJECTS)).unwrap();
        let objects =
            names(&self.dir.path().join(OBJECTS)).into_iter().map(|name| format!("{OBJECTS}/{name}"));
        for name in objects.chain([LOCK, DATABASE, wal::FILE].map(String::from)) {
            std::fs::copy(self.dir.path().join(&name), killed.path().join(&name)).unwrap();
        }
        killed
    }

    /// The items of a watch from the start, until the watch ends or has sent `most` items.
    async fn watch_items(&self, job_id: &str, most: usize) -> Vec<WatchedItem> {
        self.watch_items_from(job_id, 0, 0, false, most).await.unwrap()
    }

    async fn watch_items_from(
        &self,
        job_id: &str,
        number: u64,
        step: u64,
        events_only: bool,
        most: usize,
    ) -> Result<Vec<WatchedItem>, WatchError> {
        use futures_util::{StreamExt, TryStreamExt};
        let watch = self.store.watch(job_id.to_owned(), number, step, events_only).take(most);
        tokio::time::timeout(TEST_TIMEOUT, watch.map_ok(WatchedItem::from).try_collect()).await.unwrap()
    }
}

/// An event or a step, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WatchedItem {
    Event(u64),
    Step(u64),
}

impl From<v1::WatchJobResponse> for WatchedItem {
    fn from(message: v1::WatchJobResponse) -> Self {
        match message.kind.unwrap() {
            watch_job_response::Kind::Event(event) => Self::Event(event.number),
            watch_job_response::Kind::Step(step) => Self::Step(step.metrics.unwrap().step),
        }
    }
}

async fn open(dir: &Path) -> Result<Store, StoreError> {
    Store::open(dir, Retention { events: 1000, steps: 1000 }, ForeignObjects::Refuse).await
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn job(id: &str) -> JobRow {
    let spec = lora_spec::JobSpec { name: id.to_owned(), ..lora_spec::JobSpec::default() };
    JobRow { id: id.to_owned(), spec: v1::JobSpec::try_from(&spec).unwrap(), ..JobRow::default() }
}

fn changed(state: JobState) -> job_event::Kind {
    job_event::Kind::StateChanged(v1::StateChanged { state: state.name().to_owned(), failure: None })
}

fn notice(text: &str) -> job_event::Kind {
    job_event::Kind::Notice(v1::Notice { text: text.to_owned(), ..v1::Notice::default() })
}

fn step(step: u64) -> v1::StepReport {
    let metrics = v1::StepMetrics { step, loss: 0.1 + step as f64, ..v1::StepMetrics::default() };
    v1::StepReport { metrics: Some(metrics), logged: true, ..v1::StepReport::default() }
}

fn steps(numbers: std::ops::RangeInclusive<u64>) -> Vec<v1::StepReport> {
    numbers.map(step).collect()
}

fn checkpoint(job_id: &str, generation: u64, step: u64) -> v1::JobArtifact {
    let name = Some(v1::job_artifact::Name::CheckpointStep(step));
    v1::JobArtifact { job_id: job_id.to_owned(), generation, name }
}

fn result(job_id: &str, generation: u64, name: &str) -> v1::JobArtifact {
    let name = Some(v1::job_artifact::Name::ResultFile(name.to_owned()));
    v1::JobArtifact { job_id: job_id.to_owned(), generation, name }
}

#[tokio::test]
async fn a_store_has_one_owner_at_a_time() {
    let fixture = Fixture::new().await;
    let second = fixture.open_again().await.unwrap_err();
    assert!(matches!(&second, StoreError::InUse(dir) if dir == fixture.dir.path()), "{second}");
    let clone = fixture.store.clone();
    assert_eq!(clone.term(), 1);
    drop(clone);
    assert_eq!(fixture.reopened().await.store.term(), 2);
}

#[tokio::test]
async fn the_store_is_consistent_after_a_kill() {
    let fixture = Fixture::new().await;
    let job = fixture.add_running("one").await;
    fixture.store.add_steps("one", &steps(1..=3)).await.unwrap();
    fixture
        .store
        .save_job(&JobRow { completed_steps: 3, ..job.clone() }, vec![notice("three")])
        .await
        .unwrap();
    fixture.store.add_steps("one", &steps(4..=5)).await.unwrap();
    let (digest, committed) = fixture.commit(checkpoint("one", 1, 5), b"state").await;
    assert_eq!(committed, Ok(()));

    let crashed = fixture.killed();
    let store = Store::open(crashed.path(), fixture.store.0.retention, ForeignObjects::Refuse).await.unwrap();
    let found = Fixture { store, dir: crashed };
    assert_eq!(found.store.term(), 2);
    assert_eq!(found.store.load_job("one").await.unwrap(), Some(JobRow { completed_steps: 3, ..job }));
    assert_eq!(found.watch_items("one", 8).await, fixture.watch_items("one", 8).await);
    assert_eq!(found.store.last_step("one").await.unwrap(), 5);
    let newest = v1::Checkpoint { step: 5, digest: Some(digest) };
    assert_eq!(found.store.newest_checkpoint("one").await.unwrap(), Some(newest));
}

#[tokio::test]
async fn the_store_is_not_readable_by_other_users() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().join("a/b");
    let _store = open(&state_dir).await.unwrap();
    assert_eq!(std::fs::metadata(&state_dir).unwrap().permissions().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(DATABASE);
    std::fs::write(&path, [b'x'; 5000]).unwrap();
    let error = open(dir.path()).await.unwrap_err().to_string();
    assert!(error.contains(path.to_str().unwrap()) && error.contains("not a database"), "{error}");

    std::fs::write(dir.path().join("file"), "").unwrap();
    let path = dir.path().join("file/state");
    let error = open(&path).await.unwrap_err();
    assert!(matches!(&error, StoreError::Io { path: named, .. } if *named == path), "{error}");
}

#[tokio::test]
async fn corrupt_rows_and_newer_schemas_are_reported() {
    let fixture = Fixture::new().await;
    fixture.add(job("one")).await;
    fixture.tamper("UPDATE jobs SET spec = x'ff'").await;
    let error = fixture.store.load_job("one").await.unwrap_err().to_string();
    assert!(error.contains(DATABASE) && error.contains("spec"), "{error}");

    fixture.tamper("INSERT INTO _sqlx_migrations VALUES (99, 'newer', 0, 1, x'00', 0)").await;
    let Fixture { store, dir } = fixture;
    let retention = store.0.retention;
    drop(store);
    let error = Store::open(dir.path(), retention, ForeignObjects::Refuse).await.unwrap_err();
    assert!(matches!(error, StoreError::Migrate { .. }), "{error}");
    assert!(error.to_string().contains(DATABASE) && error.to_string().contains("99"), "{error}");
}

#[tokio::test]
async fn writes_fail_on_a_full_disk_and_succeed_after_it() {
    let fixture = Fixture::new().await;
    let row = fixture.add_running("one").await;
    fixture.store.add_steps("one", &[step(1)]).await.unwrap();
    {
        let mut writers = fixture.store.writers().await;
        let Writers { lifecycle, relaxed } = &mut *writers;
        for writer in [lifecycle, relaxed] {
            // SQLite raises this limit to the current size of the database.
            sqlx::query("PRAGMA max_page_count = 1").execute(&mut writer.connection).await.unwrap();
        }
    }
    let long = "x".repeat(100_000);
    let failed = fixture.store.save_job(&row, vec![notice(&long)]).await.unwrap_err().to_string();
    assert!(failed.contains(DATABASE) && failed.contains("full"), "{failed}");
    let report = v1::StepReport { notice: long.clone(), ..step(2) };
    let failed = fixture.store.add_steps("one", &[report]).await.unwrap_err().to_string();
    assert!(failed.contains(DATABASE) && failed.contains("full"), "{failed}");
    assert_eq!(fixture.watch_items("one", 2).await, [WatchedItem::Event(1), WatchedItem::Step(1)]);

    // The next try has space, because it uses a new connection without the limit.
    fixture.store.save_job(&row, vec![notice(&long)]).await.unwrap();
    fixture.store.add_steps("one", &[step(2)]).await.unwrap();
    assert_eq!(
        fixture.watch_items("one", 4).await,
        [WatchedItem::Event(1), WatchedItem::Step(1), WatchedItem::Event(2), WatchedItem::Step(2)]
    );
}
