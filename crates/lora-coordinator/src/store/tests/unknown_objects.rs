//! Tests of files without a row.

use std::fs::FileTimes;
use std::time::SystemTime;

use super::*;
use crate::config::LimitsConfig;
use crate::coordinator::maintain;

pub(super) const HOUR: Duration = Duration::from_secs(3600);

impl Fixture {
    /// Adds a file that was moved to `objects/`, but whose row was not committed.
    pub(super) fn add_orphan(&self, byte: u8) -> String {
        let path = self.store.object_path(&[byte; 32]).unwrap();
        std::fs::write(&path, "moved, but not committed").unwrap();
        path.file_name().unwrap().to_str().unwrap().to_owned()
    }

    pub(super) async fn search(&self, age: Duration) -> (usize, usize) {
        let UnknownObjects { found, removed } = self.store.remove_unknown_objects(age).await.unwrap();
        (found, removed)
    }

    /// Moves the results of earlier searches `age` into the past.
    pub(super) async fn age_searches(&self, age: Duration) {
        let mut writers = self.store.writers().await;
        let query = sqlx::query("UPDATE unknown_objects SET found = found - ?").bind(age.as_nanos() as i64);
        query.execute(&mut writers.lifecycle.connection).await.unwrap();
    }

    /// Sets the modification time of a file `age` into the past.
    pub(super) fn age_file(&self, name: &str, age: Duration) {
        let file = File::options().write(true).open(self.dir.path().join(OBJECTS).join(name)).unwrap();
        file.set_times(FileTimes::new().set_modified(SystemTime::now() - age)).unwrap();
    }
}

#[tokio::test]
async fn an_unknown_file_is_removed_after_the_grace_period() {
    let fixture = Fixture::new().await;
    let kept = fixture.add_input(b"kept").await.hex();
    let (old, new) = (fixture.add_orphan(7), fixture.add_orphan(9));
    fixture.age_file(&old, 1000 * HOUR);
    fixture.age_file(&kept, 1000 * HOUR);
    let mut all = vec![kept.clone(), old.clone(), new.clone()];
    all.sort();
    // The period starts when the file is first found, no matter how old the file is.
    assert_eq!(fixture.search(HOUR).await, (2, 0));
    assert_eq!(fixture.search(HOUR).await, (0, 0));
    let fixture = fixture.reopened().await;
    fixture.age_searches(HOUR / 2).await;
    assert_eq!(fixture.search(HOUR).await, (0, 0));
    assert_eq!(fixture.names(OBJECTS), all);
    fixture.age_searches(HOUR / 2).await;
    // The other file is too new: its own age counts too.
    assert_eq!(fixture.search(HOUR).await, (0, 1));
    let mut left = vec![kept.clone(), new.clone()];
    left.sort();
    assert_eq!(fixture.names(OBJECTS), left);
    fixture.age_file(&new, HOUR);
    assert_eq!(fixture.search(HOUR).await, (0, 1));
    assert_eq!(fixture.names(OBJECTS), [kept]);
    // A removed file that comes back counts as newly found.
    fixture.add_orphan(7);
    fixture.age_searches(HOUR).await;
    assert_eq!(fixture.search(HOUR).await, (1, 0));
}

#[tokio::test]
async fn a_file_that_is_uploaded_becomes_known() {
    let fixture = Fixture::new().await;
    let digest = lora_proto::DigestBuilder::of_bytes(b"again");
    let path = fixture.store.object_path(&digest.sha256).unwrap();
    std::fs::write(&path, "again").unwrap();
    assert_eq!(fixture.search(HOUR).await, (1, 0));
    fixture.age_searches(HOUR).await;
    fixture.age_file(&digest.hex(), HOUR);
    fixture.add_input(b"again").await;
    fixture.age_file(&digest.hex(), HOUR);
    assert_eq!(fixture.search(HOUR).await, (0, 0));
    assert_eq!(fixture.names(OBJECTS), [digest.hex()]);
    // The file is removed with its row: the database shows that nothing names it.
    assert_eq!(fixture.store.collect_garbage(Duration::ZERO).await.unwrap(), 1);
    assert_eq!(fixture.names(OBJECTS), [""; 0]);
}

#[tokio::test]
async fn garbage_collection_leaves_unknown_files_and_other_names_alone() {
    let fixture = Fixture::new().await;
    let orphan = fixture.add_orphan(7);
    let objects = fixture.dir.path().join(OBJECTS);
    std::fs::create_dir(objects.join("lost+found")).unwrap();
    // Names with other digits, or with another length, than the name of an object.
    let others = ["F".repeat(64), "0".repeat(62), "lost+found".to_owned()];
    for name in &others[..2] {
        std::fs::write(objects.join(name), "").unwrap();
    }
    assert_eq!(fixture.store.collect_garbage(Duration::ZERO).await.unwrap(), 0);
    assert!(fixture.names(OBJECTS).contains(&orphan));
    assert_eq!(fixture.search(Duration::ZERO).await, (1, 1));
    let mut left = others.to_vec();
    left.sort();
    assert_eq!(fixture.names(OBJECTS), left);
}

#[tokio::test]
async fn unreferenced_and_unknown_files_have_separate_periods() {
    for (unreferenced_hours, unknown_object_hours) in [(0.0, 1.0), (1.0, 0.0)] {
        let fixture = Fixture::new().await;
        let unreferenced = fixture.add_input(b"unreferenced").await.hex();
        let unknown = fixture.add_orphan(7);
        let limits = LimitsConfig { unreferenced_hours, unknown_object_hours, ..LimitsConfig::default() };
        maintain(&fixture.store, &limits).await;
        let left = if unknown_object_hours > 0.0 { unknown } else { unreferenced };
        assert_eq!(fixture.names(OBJECTS), [left]);
    }
}

#[tokio::test]
async fn a_search_during_an_upload_removes_no_file() {
    let fixture = Fixture::new().await;
    for round in 0..20 {
        let content = format!("round {round}");
        let staged = fixture.staged(content.as_bytes()).await;
        // In either order, neither the stored files nor the upload are removed.
        let (committed, searched) = tokio::join!(
            fixture.store.commit_input(staged),
            fixture.store.remove_unknown_objects(Duration::ZERO)
        );
        committed.unwrap();
        assert_eq!(searched.unwrap(), UnknownObjects { found: 0, removed: 0 });
        assert_eq!(fixture.names(OBJECTS).len(), round + 1);
    }
}
