//! Eviction from a full cache.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use lora_test_kit::artifacts::FakeArtifacts;
use lora_test_kit::server::TestServer;

use super::{FetchedFiles, InputFetcher, cache, inputs, temp, tree};

const BASE: &[u8] = b"base";

fn rows(letter: char) -> Vec<u8> {
    letter.to_string().repeat(100).into_bytes()
}

async fn fetch(cache: &InputFetcher, letter: char, server: &TestServer) -> FetchedFiles {
    cache.inputs(&inputs(BASE, &rows(letter)), server.channel()).await.unwrap()
}

/// Sets the last use of the set that contains `file` to so many seconds ago.
fn age(file: &Path, seconds: u64) {
    let then = SystemTime::now() - Duration::from_secs(seconds);
    for path in [file, file.parent().unwrap()] {
        fs::File::open(path).unwrap().set_modified(then).unwrap();
    }
}

async fn store() -> (FakeArtifacts, TestServer) {
    let (store, server) = FakeArtifacts::serve().await;
    store.add(BASE);
    for letter in ['a', 'b', 'c', 'd'] {
        store.add(&rows(letter));
    }
    (store, server)
}

#[tokio::test]
async fn the_least_recently_used_set_is_evicted_first() {
    let (dir, (store, server)) = (temp(), store().await);
    let cache = cache(dir.path(), 4 + 200);
    let a = fetch(&cache, 'a', &server).await.train.remove(0);
    let b = fetch(&cache, 'b', &server).await.train.remove(0);
    age(&a, 300);
    age(&b, 200);
    drop(fetch(&cache, 'a', &server).await);
    let c = fetch(&cache, 'c', &server).await.train.remove(0);
    assert_eq!((a.exists(), b.exists(), c.exists()), (true, false, true));
    assert_eq!(fs::read_dir(dir.path().join("objects")).unwrap().count(), 3, "base, a and c");
    assert_eq!(store.offsets().len(), 4);
}

#[tokio::test]
async fn locked_sets_are_not_evicted() {
    let (dir, (_store, server)) = (temp(), store().await);
    let (one, two) = (cache(dir.path(), 4 + 100), cache(dir.path(), 4 + 100));
    let a = fetch(&one, 'a', &server).await;
    let b = fetch(&two, 'b', &server).await;
    assert!(
        a.train[0].exists() && b.train[0].exists(),
        "the cache exceeds its limit, but everything is in use"
    );
    let path = a.train[0].clone();
    drop(a);
    let c = fetch(&two, 'c', &server).await;
    assert_eq!((path.exists(), b.train[0].exists(), c.train[0].exists()), (false, true, true));
    assert_eq!(fs::read(&b.train[0]).unwrap(), rows('b'));
    assert!(c.base.join("config.json").exists());
}

#[tokio::test]
async fn a_job_larger_than_the_cache_is_served() {
    let (dir, (_store, server)) = (temp(), store().await);
    let cache = cache(dir.path(), 10);
    let a = fetch(&cache, 'a', &server).await;
    assert_eq!(fs::read(&a.train[0]).unwrap(), rows('a'));
    drop(a);
    drop(super::cache(dir.path(), 10));
    assert!(tree(dir.path()).is_empty(), "nothing is in use any more");
}

#[tokio::test]
async fn a_file_of_two_sets_is_removed_with_the_last_one() {
    let (dir, (store, server)) = (temp(), store().await);
    let cache = cache(dir.path(), 100 + 4);
    let mut requested = inputs(BASE, &rows('a'));
    let first = cache.inputs(&requested, server.channel()).await.unwrap().train.remove(0);
    requested.train[0].name = "other.jsonl".to_owned();
    let second = cache.inputs(&requested, server.channel()).await.unwrap();
    assert!(first.exists() && second.train[0].exists(), "they are one file on disk");
    assert_eq!(store.offsets().len(), 2);
    age(&first, 100);
    let b = fetch(&cache, 'b', &server).await;
    assert!(!first.exists() && second.train[0].exists());
    assert_eq!(fs::read(&second.train[0]).unwrap(), rows('a'));
    drop((b, second));
}

#[tokio::test]
async fn abandoned_partial_files_are_evicted() {
    let (dir, (_store, server)) = (temp(), store().await);
    let cache = cache(dir.path(), 4 + 100);
    let partial = dir.path().join("partial/given-up");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("content"), rows('x')).unwrap();
    drop(fetch(&cache, 'a', &server).await);
    assert!(!partial.exists());
}
