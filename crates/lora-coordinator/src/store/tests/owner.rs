//! Tests of a start with a database that did not store the files.

use std::path::PathBuf;

use sqlx::migrate::Migrator;

use super::unknown_objects::HOUR;
use super::*;
use crate::config::LimitsConfig;
use crate::coordinator::maintain;

/// The state directory of a closed store.
struct Closed(TempDir);

impl Closed {
    /// A state directory with one file, and the digest of this file.
    async fn with_a_file() -> (Self, v1::FileDigest) {
        let fixture = Fixture::new().await;
        let digest = fixture.add_input(b"kept").await;
        (Self::from(fixture).await, digest)
    }

    async fn from(fixture: Fixture) -> Self {
        let Fixture { store, dir } = fixture;
        close(store).await;
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// The store after two more starts.
    async fn reopened(self) -> Fixture {
        let fixture = self.open(ForeignObjects::Refuse).await;
        Self::from(fixture).await.open(ForeignObjects::Refuse).await
    }

    async fn open(self, foreign: ForeignObjects) -> Fixture {
        let retention = Retention { events: 1000, steps: 1000 };
        let store = Store::open(self.path(), retention, foreign).await.unwrap();
        Fixture { store, dir: self.0 }
    }

    /// Returns the error of a start. Panics if one of two starts succeeds or changes a file, or if
    /// their errors differ.
    async fn refused(&self, foreign: ForeignObjects) -> StoreError {
        let before = contents(self.path());
        let retention = Retention { events: 1000, steps: 1000 };
        let mut errors = Vec::new();
        for _ in 0..2 {
            errors.push(Store::open(self.path(), retention, foreign).await.unwrap_err());
            // `assert_eq` would print the contents.
            assert!(contents(self.path()) == before, "{:?}", names(self.path()));
        }
        let [first, second] = <[StoreError; 2]>::try_from(errors).unwrap();
        assert_eq!(first.to_string(), second.to_string());
        assert!(!first.to_string().contains('\n'));
        first
    }

    /// Panics if a start is not refused with `reason`, or changes a file.
    async fn assert_refused(&self, reason: &str) {
        let error = self.refused(ForeignObjects::Refuse).await;
        assert!(matches!(error, StoreError::NotOwner { .. }), "{error:?}");
        let error = error.to_string();
        let (objects, database) = (self.path().join(OBJECTS), self.path().join(DATABASE));
        let beginning = format!("{} holds files, but {} {reason}", objects.display(), database.display());
        assert!(error.starts_with(&beginning), "{error}");
        for remedy in [
            "; restore the newest copy of the database \
             (remove coordinator.db-wal and coordinator.db-shm first),",
            "set state_dir",
            "adopt_objects=true",
        ] {
            assert!(error.contains(remedy), "{error}");
        }
    }

    /// Panics if a start is not refused because all files are missing, or changes a file.
    async fn assert_no_objects(&self) {
        let error = self.refused(ForeignObjects::Refuse).await;
        assert!(matches!(error, StoreError::NoObjects { .. }), "{error:?}");
        let error = error.to_string();
        let (objects, database) = (self.path().join(OBJECTS), self.path().join(DATABASE));
        let beginning =
            format!("{} holds no files, but {} lists some; mount", objects.display(), database.display());
        assert!(error.starts_with(&beginning) && error.contains("adopt_objects=true"), "{error}");
    }

    /// Replaces the database by a copy of `by`, or removes it.
    fn replace_database(&self, by: Option<&Path>) {
        for name in names(self.path()).into_iter().filter(|name| name.starts_with(DATABASE)) {
            std::fs::remove_file(self.path().join(name)).unwrap();
        }
        if let Some(by) = by {
            std::fs::copy(by, self.path().join(DATABASE)).unwrap();
        }
    }

    fn owner_file(&self) -> PathBuf {
        self.path().join(OBJECTS).join("owner.json")
    }

    /// Removes all files except `owner.json`.
    fn remove_objects(&self) {
        let objects = self.path().join(OBJECTS);
        for name in names(&objects).iter().filter(|name| *name != "owner.json") {
            std::fs::remove_file(objects.join(name)).unwrap();
        }
    }
}

/// Closes a store and its connections, so that the log is moved into the database's file.
async fn close(store: Store) {
    let inner = Arc::into_inner(store.0).unwrap();
    inner.readers.close().await;
    let Writers { lifecycle, relaxed } = inner.writers.into_inner();
    relaxed.connection.close().await.unwrap();
    lifecycle.connection.close().await.unwrap();
}

/// The content of each file below a directory, by its path.
fn contents(dir: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let mut all = std::collections::BTreeMap::new();
    for name in names(dir) {
        let path = dir.join(&name);
        match path.is_dir() {
            true => all.extend(contents(&path).into_iter().map(|(below, c)| (format!("{name}/{below}"), c))),
            false => drop(all.insert(name, std::fs::read(&path).unwrap())),
        }
    }
    all
}

#[tokio::test]
async fn a_missing_or_empty_database_is_refused_without_creating_one() {
    let (closed, digest) = Closed::with_a_file().await;
    closed.replace_database(None);
    closed.assert_refused("is missing or empty").await;
    assert!(!closed.path().join(DATABASE).exists());
    std::fs::write(closed.path().join(DATABASE), "").unwrap();
    closed.assert_refused("is missing or empty").await;

    // A database that has its tables, but lists no file; with and without an owner file.
    closed.replace_database(None);
    let new = Fixture::new().await;
    new.add(job("one")).await;
    let new = Closed::from(new).await;
    closed.replace_database(Some(&new.path().join(DATABASE)));
    closed.assert_refused("is not the database that stored them").await;
    std::fs::remove_file(closed.owner_file()).unwrap();
    closed.assert_refused("lists none of them").await;
    assert!(closed.path().join(OBJECTS).join(digest.hex()).exists());
}

#[tokio::test]
async fn another_database_is_refused() {
    let (closed, _) = Closed::with_a_file().await;
    let (other, _) = Closed::with_a_file().await;
    closed.replace_database(Some(&other.path().join(DATABASE)));
    closed.assert_refused("is not the database that stored them").await;
}

#[tokio::test]
async fn an_older_copy_is_refused_after_each_kind_of_change() {
    let train = lora_proto::DigestBuilder::of_bytes(b"train");
    let reading = |digest: &v1::FileDigest| {
        let file = v1::StoredFile { name: "t".into(), digest: Some(digest.clone()) };
        JobRow { inputs: v1::Inputs { train: vec![file], ..v1::Inputs::default() }, ..job("two") }
    };
    for change in ["start", "input", "submit", "artifact", "result", "collection"] {
        let fixture = Fixture::new().await;
        let row = fixture.add_running("one").await;
        fixture.commit(checkpoint("one", 1, 0), b"kept").await.1.unwrap();
        fixture.add_input(b"train").await;
        let copy = fixture.dir.path().join("copy");
        fixture.vacuum_into(&copy).await;
        match change {
            "input" => drop(fixture.add_input(b"new").await),
            "submit" => drop(fixture.add(reading(&train)).await),
            "artifact" => drop(fixture.commit(checkpoint("one", 1, 1), b"state").await),
            "result" => {
                let done = JobRow { state: JobState::Succeeded, ..row };
                fixture.store.commit_result(&done, &[], vec![notice("done")]).await.unwrap().unwrap();
            }
            "collection" => {
                assert_eq!(fixture.store.collect_garbage(Duration::ZERO).await.unwrap(), 1);
            }
            _ => {}
        }
        let mut closed = Closed::from(fixture).await;
        if change == "start" {
            closed = Closed::from(closed.open(ForeignObjects::Refuse).await).await;
        }
        closed.replace_database(Some(&copy));
        closed.assert_refused("is an older copy of their database: its revision is ").await;
    }
}

#[tokio::test]
async fn restarts_and_complete_copies_are_accepted() {
    let (closed, digest) = Closed::with_a_file().await;
    let fixture = closed.reopened().await;
    // A complete copy of the directory, and one of an earlier version, without an owner file.
    for keep_owner in [true, false] {
        let copy = tempfile::tempdir().unwrap();
        fixture.vacuum_into(&copy.path().join(DATABASE)).await;
        std::fs::create_dir(copy.path().join(OBJECTS)).unwrap();
        for name in names(&fixture.dir.path().join(OBJECTS)) {
            if keep_owner || name != "owner.json" {
                let from = fixture.dir.path().join(OBJECTS).join(&name);
                std::fs::copy(from, copy.path().join(OBJECTS).join(name)).unwrap();
            }
        }
        let store = open(copy.path()).await.unwrap();
        assert_eq!(store.object_digest(&digest.sha256).await.unwrap(), Some(digest.clone()));
        assert!(copy.path().join(OBJECTS).join("owner.json").exists());
    }
}

#[tokio::test]
async fn a_crash_between_commit_and_owner_file_is_accepted() {
    let (closed, _) = Closed::with_a_file().await;
    let before = std::fs::read(closed.owner_file()).unwrap();
    let fixture = closed.open(ForeignObjects::Refuse).await;
    fixture.add_input(b"new").await;
    let closed = Closed::from(fixture).await;
    std::fs::write(closed.owner_file(), before).unwrap();
    closed.open(ForeignObjects::Refuse).await;
}

#[tokio::test]
async fn a_start_with_an_unreadable_owner_file_is_refused() {
    let (closed, _) = Closed::with_a_file().await;
    let path = closed.owner_file();
    std::fs::write(&path, "{\"data").unwrap();
    let error = closed.refused(ForeignObjects::Refuse).await;
    assert!(matches!(&error, StoreError::Io { path: named, .. } if *named == path), "{error:?}");
    assert!(error.to_string().contains("is corrupt: EOF"), "{error}");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let error = closed.refused(ForeignObjects::Refuse).await;
    assert!(matches!(&error, StoreError::Io { path: named, .. } if *named == path), "{error:?}");
}

#[tokio::test]
async fn a_start_that_cannot_write_the_owner_file_fails() {
    let (closed, _) = Closed::with_a_file().await;
    std::fs::create_dir(closed.path().join(OBJECTS).join("owner.json.new")).unwrap();
    let error = open(closed.path()).await.unwrap_err();
    let path = closed.owner_file();
    assert!(matches!(&error, StoreError::Io { path: named, .. } if *named == path), "{error:?}");
}

#[tokio::test]
async fn a_refused_database_of_an_earlier_version_is_not_migrated() {
    let (closed, _) = Closed::with_a_file().await;
    closed.replace_database(None);
    let path = closed.path().join(DATABASE);
    let options = SqliteConnectOptions::new().filename(&path).create_if_missing(true);
    let mut db = SqliteConnection::connect_with(&options).await.unwrap();
    let earlier = connections::migrations().iter().take(2).cloned().collect();
    Migrator::with_migrations(earlier).run(&mut db).await.unwrap();
    sqlx::query("INSERT INTO objects (sha256, size) VALUES (zeroblob(32), 1)")
        .execute(&mut db)
        .await
        .unwrap();
    db.close().await.unwrap();
    closed.assert_refused("is not the database that stored them").await;
    let fixture = closed.open(ForeignObjects::Adopt).await;
    assert_eq!(fixture.store.term(), 2);
}

#[tokio::test]
async fn a_database_whose_files_are_all_gone_is_refused() {
    let fixture = Fixture::new().await;
    fixture.add_running("one").await;
    fixture.commit(checkpoint("one", 1, 1), b"state").await.1.unwrap();
    let copy = fixture.dir.path().join("copy");
    fixture.vacuum_into(&copy).await;
    fixture.add_input(b"new").await;
    let closed = Closed::from(fixture).await;
    // The directory is not mounted.
    let objects = closed.path().join(OBJECTS);
    std::fs::rename(&objects, closed.path().join("unmounted")).unwrap();
    std::fs::create_dir(&objects).unwrap();
    closed.assert_no_objects().await;
    std::fs::remove_dir(&objects).unwrap();
    std::fs::rename(closed.path().join("unmounted"), &objects).unwrap();
    // The files are removed, and the database is older than they were.
    closed.remove_objects();
    closed.replace_database(Some(&copy));
    closed.assert_no_objects().await;

    let fixture = closed.open(ForeignObjects::Adopt).await;
    assert_eq!(fixture.store.newest_checkpoint("one").await.unwrap(), None);
    let fixture = Closed::from(fixture).await.open(ForeignObjects::Refuse).await;
    // The files are missing again, but the owner file names this database.
    fixture.add_input(b"new").await;
    let closed = Closed::from(fixture).await;
    closed.remove_objects();
    closed.open(ForeignObjects::Refuse).await;
}

#[tokio::test]
async fn the_log_of_a_killed_process_is_not_replayed_into_another_copy() {
    let (closed, _) = Closed::with_a_file().await;
    let copies = tempfile::tempdir().unwrap();
    let copy = |name: &str| copies.path().join(name);
    std::fs::copy(closed.path().join(DATABASE), copy("stopped")).unwrap();
    // Another database, whose log has been moved into its file more often.
    let other = Fixture::new().await;
    for _ in 0..9 {
        other.store.checkpoint_wal().await.unwrap();
    }
    let other = Closed::from(other).await;
    std::fs::copy(other.path().join(DATABASE), copy("other")).unwrap();
    let fixture = closed.open(ForeignObjects::Refuse).await;
    fixture.add_input(b"newer").await;
    // A copy as `.backup` makes it: the pages of the database, including those in the log.
    let killed = fixture.killed();
    let options = SqliteConnectOptions::new().filename(killed.path().join(DATABASE));
    SqliteConnection::connect_with(&options).await.unwrap().close().await.unwrap();
    std::fs::copy(killed.path().join(DATABASE), copy("backup")).unwrap();
    maintain(&fixture.store, &LimitsConfig::default()).await;
    fixture.vacuum_into(&copy("vacuumed")).await;
    let newest = fixture.add_input(b"newest").await;

    for (name, reason) in [
        ("stopped", "is an older copy of their database"),
        ("vacuumed", "is an older copy of their database"),
        ("backup", "is an older copy of their database"),
        ("other", "is not the database that stored them"),
    ] {
        let killed = Closed(fixture.killed());
        std::fs::copy(copy(name), killed.path().join(DATABASE)).unwrap();
        for foreign in [ForeignObjects::Refuse, ForeignObjects::Adopt] {
            let error = killed.refused(foreign).await;
            assert!(matches!(error, StoreError::ForeignWal(_)), "{name}: {error:?}");
            let log = killed.path().join(wal::FILE);
            let database = killed.path().join(DATABASE);
            let beginning =
                format!("{} was written for another copy of {};", log.display(), database.display());
            let error = error.to_string();
            assert!(error.starts_with(&beginning), "{error}");
            assert!(error.contains("remove coordinator.db-wal and coordinator.db-shm"), "{error}");
        }
        std::fs::remove_file(killed.path().join(wal::FILE)).unwrap();
        killed.assert_refused(reason).await;
    }
    let fixture = Closed(fixture.killed()).open(ForeignObjects::Refuse).await;
    assert_eq!(fixture.store.object_digest(&newest.sha256).await.unwrap(), Some(newest));
}

#[tokio::test]
async fn an_interrupted_checkpoint_of_the_log_is_completed() {
    let fixture = Fixture::new().await;
    let database = |dir: &TempDir| dir.path().join(DATABASE);
    let before = std::fs::read(database(&fixture.dir)).unwrap();
    fixture.add_running("one").await;
    fixture.store.add_steps("one", &steps(1..=200)).await.unwrap();
    let killed = fixture.killed();
    fixture.store.checkpoint_wal().await.unwrap();
    let after = std::fs::read(database(&fixture.dir)).unwrap();
    assert!(after.len() > before.len());
    // Only the first page has reached the file. Its header names more pages than the file has.
    let page = 4096;
    std::fs::write(database(&killed), [&after[..page], &before[page..]].concat()).unwrap();
    assert!(Contents::of_file(&database(&killed)).await.is_err());
    let fixture = Closed(killed).open(ForeignObjects::Refuse).await;
    assert_eq!(fixture.store.last_step("one").await.unwrap(), 200);
}

#[tokio::test]
async fn a_finished_store_leaves_an_empty_log() {
    let fixture = Fixture::new().await;
    fixture.add(job("one")).await;
    let log = fixture.dir.path().join(wal::FILE);
    assert!(std::fs::metadata(&log).unwrap().len() > 0);
    fixture.store.end_work().await;
    assert!(fixture.store.truncate_wal().await.unwrap());
    assert_eq!(std::fs::metadata(&log).unwrap().len(), 0);
}

/// A state directory with an older copy of the database. The copy was made after a file was
/// uploaded, and before a job that reads this file was submitted. Also returns the digest of the
/// file.
async fn with_an_older_copy(fixture: Fixture) -> (Closed, v1::FileDigest) {
    let digest = fixture.add_input(b"train").await;
    // The file counts as uploaded long ago.
    fixture.tamper("UPDATE objects SET wanted = 0").await;
    let copy = fixture.dir.path().join("copy");
    fixture.vacuum_into(&copy).await;
    let file = v1::StoredFile { name: "t".into(), digest: Some(digest.clone()) };
    let inputs = v1::Inputs { train: vec![file], ..v1::Inputs::default() };
    fixture.add(JobRow { inputs, ..job("newer") }).await;
    let closed = Closed::from(fixture).await;
    closed.replace_database(Some(&copy));
    (closed, digest)
}

#[tokio::test]
async fn files_that_only_a_newer_database_names_are_kept_like_unknown_files() {
    let (closed, digest) = with_an_older_copy(Fixture::new().await).await;
    let fixture = closed.open(ForeignObjects::Adopt).await;
    let limits = LimitsConfig::default();
    for _ in 0..2 {
        maintain(&fixture.store, &limits).await;
        assert_eq!(fixture.names(OBJECTS), [digest.hex()]);
    }
    fixture.age_file(&digest.hex(), 1000 * HOUR);
    fixture.age_searches(limits.unknown_objects() - HOUR).await;
    maintain(&fixture.store, &limits).await;
    assert_eq!(fixture.names(OBJECTS), [digest.hex()]);
    fixture.age_searches(HOUR).await;
    maintain(&fixture.store, &limits).await;
    assert_eq!(fixture.names(OBJECTS), [""; 0]);
}

#[tokio::test]
async fn adopting_restarts_the_period_of_unknown_files() {
    let fixture = Fixture::new().await;
    let unknown = fixture.add_orphan(7);
    fixture.age_file(&unknown, 1000 * HOUR);
    assert_eq!(fixture.search(HOUR).await, (1, 0));
    fixture.age_searches(1000 * HOUR).await;
    let (closed, digest) = with_an_older_copy(fixture).await;
    let fixture = closed.open(ForeignObjects::Adopt).await;
    assert_eq!(fixture.search(HOUR).await, (2, 0));
    let mut all = vec![unknown, digest.hex()];
    all.sort();
    assert_eq!(fixture.names(OBJECTS), all);
}

#[tokio::test]
async fn adopting_removes_checkpoints_without_a_file() {
    let fixture = Fixture::new().await;
    fixture.add_running("one").await;
    let (first, _) = fixture.commit(checkpoint("one", 1, 1), b"1").await;
    let (second, _) = fixture.commit(checkpoint("one", 1, 2), b"2").await;
    let lost = fixture.store.object_path(&second.sha256).unwrap();
    let (closed, _) = with_an_older_copy(fixture).await;
    std::fs::remove_file(lost).unwrap();
    let fixture = closed.open(ForeignObjects::Adopt).await;
    let newest = v1::Checkpoint { step: 1, digest: Some(first) };
    assert_eq!(fixture.store.newest_checkpoint("one").await.unwrap(), Some(newest));
    assert_eq!(fixture.store.object_digest(&second.sha256).await.unwrap(), None);
}

#[tokio::test]
async fn any_database_is_accepted_without_files() {
    let closed = Closed::from(Fixture::new().await).await;
    closed.replace_database(None);
    std::fs::create_dir(closed.path().join(OBJECTS).join("lost+found")).unwrap();
    let fixture = closed.open(ForeignObjects::Refuse).await;
    fixture.add_input(b"new").await;
    fixture.reopened().await;
}

#[tokio::test]
async fn adopted_files_are_kept_and_their_former_database_is_refused() {
    let (closed, digest) = Closed::with_a_file().await;
    let former = closed.path().join("former");
    let fixture = closed.reopened().await;
    let term = fixture.store.term();
    fixture.vacuum_into(&former).await;
    let closed = Closed::from(fixture).await;
    closed.replace_database(None);
    let fixture = closed.open(ForeignObjects::Adopt).await;
    // Workers refuse a lower term than they have seen.
    assert_eq!(fixture.store.term(), term + 1);
    assert_eq!(fixture.names(OBJECTS), [digest.hex()]);
    let missing = fixture.store.find_missing(vec![digest.clone()]).await.unwrap();
    assert_eq!(missing, std::slice::from_ref(&digest));
    let other = fixture.add_input(b"new").await;

    // The setting is meant for one start, and changes nothing in another.
    let fixture = Closed::from(fixture).await.open(ForeignObjects::Refuse).await;
    let fixture = Closed::from(fixture).await.open(ForeignObjects::Adopt).await;
    assert_eq!(fixture.store.object_digest(&other.sha256).await.unwrap(), Some(other));
    // A file that is uploaded again gets a row again.
    assert_eq!(fixture.add_input(b"kept").await, digest);
    let closed = Closed::from(fixture).await;
    closed.replace_database(Some(&former));
    closed.assert_refused("is not the database that stored them").await;
}
