//! Starts of a coordinator with a database that did not store the files.

use std::path::{Path, PathBuf};

use lora_coordinator::{Coordinator, CoordinatorError};
use lora_proto::v1::{self, job_artifact};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{Connection, SqliteConnection};
use tempfile::TempDir;

use crate::fake::{Cluster, FakeWorker, fast_config, job, train};

fn objects(state: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(state.join("objects")).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn remove_database(state: &Path) {
    for name in ["coordinator.db", "coordinator.db-wal", "coordinator.db-shm"] {
        match std::fs::remove_file(state.join(name)) {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{name}"),
        }
    }
}

/// Copies the database while the coordinator runs. Returns the path of the copy.
async fn back_up(state: &Path) -> PathBuf {
    let backup = state.join("backup.db");
    let options = SqliteConnectOptions::new().filename(state.join("coordinator.db"));
    let mut db = SqliteConnection::connect_with(&options).await.unwrap();
    sqlx::query("VACUUM INTO ?").bind(backup.to_str().unwrap()).execute(&mut db).await.unwrap();
    db.close().await.unwrap();
    backup
}

/// Panics if a start is not refused, or removes a file. The tests of the store cover later
/// removals, because the first collection is ten minutes after the start.
async fn assert_refused(state: &TempDir, reason: &str) {
    let mut config = fast_config();
    config.state_dir = state.path().to_owned();
    config.grpc.listen = "127.0.0.1:0".into();
    config.http.listen = String::new();
    let before = objects(state.path());
    let error = Coordinator::bind(&config).await.err().unwrap();
    assert!(matches!(error, CoordinatorError::NotOwner(_)), "{error}");
    let error = error.to_string();
    assert!(error.starts_with("state_dir: ") && error.contains(reason), "{error}");
    assert!(error.contains("adopt_objects=true"), "{error}");
    assert_eq!(objects(state.path()), before);
}

#[tokio::test]
async fn results_outlive_a_lost_database() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    cluster.result(&a[0], "receipt.json", b"{}").await;
    w0.disconnect();
    let term = FakeWorker::connect(&cluster, "w1").await.welcome.term;
    let state = cluster.end().await;
    let stored = objects(state.path());
    remove_database(state.path());
    assert_refused(&state, "coordinator.db is missing or empty").await;
    assert!(!state.path().join("coordinator.db").exists());

    let mut config = fast_config();
    config.adopt_objects = true;
    let cluster = Cluster::start_in(state, config).await;
    assert_eq!(objects(&cluster.config.state_dir), stored);
    assert!(FakeWorker::connect(&cluster, "w1").await.welcome.term > term);
    let unknown = cluster.jobs().get_job(v1::GetJobRequest { job_id }).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    cluster.submit(&job(1, 1)).await;
    let state = cluster.end().await;
    let cluster = Cluster::start_in(state, fast_config()).await;
    assert!(objects(&cluster.config.state_dir).len() >= stored.len());
    cluster.stop().await;
}

#[tokio::test]
async fn a_restored_backup_is_refused_beside_newer_files() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let backup = back_up(&cluster.config.state_dir).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    let name = job_artifact::Name::CheckpointStep(3);
    cluster.upload(&a[0], name, b"three").await.unwrap();
    w0.disconnect();
    let state = cluster.end().await;
    let stored = objects(state.path());
    remove_database(state.path());
    std::fs::copy(&backup, state.path().join("coordinator.db")).unwrap();
    assert_refused(&state, "coordinator.db is an older copy of their database").await;

    let mut config = fast_config();
    config.adopt_objects = true;
    let cluster = Cluster::start_in(state, config).await;
    assert_eq!(objects(&cluster.config.state_dir), stored);
    cluster.until(&job_id, "queued").await;
    cluster.restart().await.stop().await;
}
