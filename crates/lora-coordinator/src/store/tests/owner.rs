//! A start with a database that is not the one that stored the files.

use super::*;

/// A state directory whose store is closed.
struct Closed(TempDir);

impl Closed {
    /// With one file in it, of which the digest is given too.
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

    /// The store after two starts.
    async fn reopened(self) -> Fixture {
        let fixture = self.open(ForeignObjects::Refuse).await;
        Self::from(fixture).await.open(ForeignObjects::Refuse).await
    }

    async fn open(self, foreign: ForeignObjects) -> Fixture {
        let retention = Retention { events: 1000, steps: 1000 };
        let store = Store::open(self.path(), retention, foreign).await.unwrap();
        Fixture { store, dir: self.0 }
    }

    /// Fails where a start is not refused with `reason`, or changes anything.
    async fn assert_refused(&self, reason: &str) {
        let before = contents(self.path());
        for _ in 0..2 {
            let error = open(self.path()).await.unwrap_err().to_string();
            let (objects, database) = (self.path().join(OBJECTS), self.path().join(DATABASE));
            let beginning = format!("{} holds files, but {} {reason}", objects.display(), database.display());
            assert!(error.starts_with(&beginning), "{error}");
            for way_on in
                ["; restore the newest copy of the database,", "set state_dir", "adopt_objects=true"]
            {
                assert!(error.contains(way_on), "{error}");
            }
            assert!(!error.contains('\n'));
            let after = contents(self.path());
            assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
            for (name, content) in &after {
                // Only the database itself may be brought to this version.
                assert!(*content == before[name] || name == DATABASE, "{name}");
            }
        }
    }

    /// Puts another database in the place of this one.
    fn replace_database(&self, by: Option<&Path>) {
        for name in names(self.path()).into_iter().filter(|name| name.starts_with(DATABASE)) {
            std::fs::remove_file(self.path().join(name)).unwrap();
        }
        if let Some(by) = by {
            std::fs::copy(by, self.path().join(DATABASE)).unwrap();
        }
    }

    fn owner_file(&self) -> std::path::PathBuf {
        self.path().join(OBJECTS).join("owner.json")
    }
}

/// Ends a store with its connections, so that its database is one file.
async fn close(store: Store) {
    let inner = Arc::into_inner(store.0).unwrap();
    inner.readers.close().await;
    inner.writers.into_inner().close().await.unwrap();
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
async fn a_missing_or_empty_database_is_refused_and_replaced_by_nothing() {
    let (closed, digest) = Closed::with_a_file().await;
    closed.replace_database(None);
    closed.assert_refused("is missing or empty").await;
    assert!(!closed.path().join(DATABASE).exists());
    std::fs::write(closed.path().join(DATABASE), "").unwrap();
    closed.assert_refused("is missing or empty").await;

    // One that has its tables, but no file; whether the owner is named or not.
    closed.replace_database(None);
    let new = Closed::from(Fixture::new().await).await;
    closed.replace_database(Some(&new.path().join(DATABASE)));
    closed.assert_refused("is missing or empty").await;
    std::fs::remove_file(closed.owner_file()).unwrap();
    closed.assert_refused("is missing or empty").await;
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
    let train = lora_proto::DigestBuilder::of(b"train");
    let reading = |digest: &v1::FileDigest| {
        let file = v1::StoredFile { name: "t".into(), digest: Some(digest.clone()) };
        JobRow { inputs: v1::Inputs { train: Some(file), ..v1::Inputs::default() }, ..job("two") }
    };
    for change in ["start", "input", "submit", "artifact", "result", "collection"] {
        let fixture = Fixture::new().await;
        let row = fixture.add_running("one").await;
        fixture.commit(checkpoint("one", 1, 0), b"kept").await;
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
async fn restarts_and_whole_copies_are_taken() {
    let (closed, digest) = Closed::with_a_file().await;
    let fixture = closed.reopened().await;
    // A directory that was copied as a whole, and one that no version before this one has marked.
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
async fn a_crash_between_the_commit_and_the_mark_is_no_reason_to_refuse() {
    let (closed, _) = Closed::with_a_file().await;
    let before = std::fs::read(closed.owner_file()).unwrap();
    let fixture = closed.open(ForeignObjects::Refuse).await;
    fixture.add_input(b"new").await;
    let closed = Closed::from(fixture).await;
    // Also one that cannot be read: a loss of power may leave that.
    for left in [before, b"{\"data".to_vec()] {
        std::fs::write(closed.owner_file(), left).unwrap();
        let store = open(closed.path()).await.unwrap();
        close(store).await;
    }
}

#[tokio::test]
async fn without_files_every_database_is_taken() {
    let closed = Closed::from(Fixture::new().await).await;
    closed.replace_database(None);
    std::fs::create_dir(closed.path().join(OBJECTS).join("lost+found")).unwrap();
    let fixture = closed.open(ForeignObjects::Refuse).await;
    fixture.add_input(b"new").await;
    fixture.reopened().await;
}

#[tokio::test]
async fn adopted_files_stay_and_their_former_database_is_refused() {
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

    // The setting is for one start, and does no harm in another.
    let fixture = Closed::from(fixture).await.open(ForeignObjects::Refuse).await;
    let fixture = Closed::from(fixture).await.open(ForeignObjects::Adopt).await;
    assert_eq!(fixture.store.object_digest(&other.sha256).await.unwrap(), Some(other));
    // A file that is uploaded again is known again.
    assert_eq!(fixture.add_input(b"kept").await, digest);
    let closed = Closed::from(fixture).await;
    closed.replace_database(Some(&former));
    closed.assert_refused("is not the database that stored them").await;
}
