//! Files without a row.

use std::fs::FileTimes;
use std::time::SystemTime;

use super::*;
use crate::config::LimitsConfig;
use crate::coordinator::maintain;

pub(super) const HOUR: Duration = Duration::from_secs(3600);

impl Fixture {
    /// A file that was moved to its place, but not committed.
    pub(super) fn add_orphan(&self, byte: u8) -> String {
        let path = self.store.object_path(&[byte; 32]).unwrap();
        std::fs::write(&path, "moved, but not committed").unwrap();
        path.file_name().unwrap().to_str().unwrap().to_owned()
    }

    pub(super) async fn search(&self, age: Duration) -> (usize, usize) {
        let UnknownObjects { found, removed } = self.store.remove_unknown_objects(age).await.unwrap();
        (found, removed)
    }

    /// Lets `age` pass for what earlier searches found.
    pub(super) async fn age_searches(&self, age: Duration) {
        let mut writers = self.store.writers().await;
        let query = sqlx::query("UPDATE unknown_objects SET found = found - ?").bind(age.as_nanos() as i64);
        query.execute(&mut writers.lifecycle.connection).await.unwrap();
    }

    /// Lets `age` pass for a file.
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
    // However old a file is, the time counts from when it was found.
    assert_eq!(fixture.search(HOUR).await, (2, 0));
    assert_eq!(fixture.search(HOUR).await, (0, 0));
    let fixture = fixture.reopened().await;
    fixture.age_searches(HOUR / 2).await;
    assert_eq!(fixture.search(HOUR).await, (0, 0));
    assert_eq!(fixture.names(OBJECTS), all);
    fixture.age_searches(HOUR / 2).await;
    // The other one was written again meanwhile.
    assert_eq!(fixture.search(HOUR).await, (0, 1));
    let mut left = vec![kept.clone(), new.clone()];
    left.sort();
    assert_eq!(fixture.names(OBJECTS), left);
    fixture.age_file(&new, HOUR);
    assert_eq!(fixture.search(HOUR).await, (0, 1));
    assert_eq!(fixture.names(OBJECTS), [kept]);
    // What was removed is forgotten, and found anew if it comes back.
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
    // Once its row is gone, so is the file: the database itself knew that nothing names it.
    assert_eq!(fixture.store.collect_garbage(Duration::ZERO).await.unwrap(), 1);
    assert_eq!(fixture.names(OBJECTS), [""; 0]);
}

#[tokio::test]
async fn garbage_collection_leaves_unknown_files_and_other_names_alone() {
    let fixture = Fixture::new().await;
    let orphan = fixture.add_orphan(7);
    let objects = fixture.dir.path().join(OBJECTS);
    std::fs::create_dir(objects.join("lost+found")).unwrap();
    // Neither the digits nor the length of an object's name.
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
async fn unreferenced_and_unknown_files_have_their_own_time() {
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
async fn an_upload_and_a_search_at_once_never_leave_a_row_without_its_file() {
    let fixture = Fixture::new().await;
    for round in 0..20 {
        let content = format!("round {round}");
        let (digest, staged) = fixture.staged(content.as_bytes()).await;
        // Whatever the order, what is there before or being uploaded is not removed.
        let (committed, searched) = tokio::join!(
            fixture.store.commit_input(&digest, staged),
            fixture.store.remove_unknown_objects(Duration::ZERO)
        );
        committed.unwrap();
        assert_eq!(searched.unwrap(), UnknownObjects { found: 0, removed: 0 });
        assert_eq!(fixture.names(OBJECTS).len(), round + 1);
    }
}
