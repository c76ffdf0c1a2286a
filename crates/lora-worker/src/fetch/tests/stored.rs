//! Files of the coordinator's store.

use std::fs;
use std::time::{Duration, SystemTime};

use lora_proto::{DigestBuilder, v1};
use lora_test_kit::artifacts::FakeArtifacts;
use tokio::time::timeout;

use super::{LARGE_CACHE, TEST_TIMEOUT, cache, inputs, refusal, stored_file, temp, tree, until};

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i * 31 + i / 251) as u8).collect()
}

#[tokio::test]
async fn inputs_keep_their_names_and_are_fetched_once() {
    let (dir, (store, server)) = (temp(), FakeArtifacts::serve().await);
    let contents: [&[u8]; 6] = [b"config", b"weights", b"rows", b"other rows", b"adapter", b""];
    for content in contents {
        store.add(content);
    }
    let requested = v1::Inputs {
        base: Some(v1::Base {
            source: Some(v1::base::Source::Files(v1::FileSet {
                files: vec![
                    stored_file("config.json", b"config"),
                    stored_file("model.safetensors", b"weights"),
                    stored_file("merges.txt", b""),
                ],
            })),
        }),
        train: vec![stored_file("rows.jsonl", b"rows")],
        eval: Some(stored_file("rows.jsonl", b"other rows")),
        init_from: vec![stored_file("adapter_model.safetensors", b"adapter")],
        tokens: vec![stored_file("key.safetensors", b"other rows")],
    };
    let got = cache(dir.path(), LARGE_CACHE).inputs(&requested, server.channel()).await.unwrap();
    let (eval, init_from) = (got.eval.clone().unwrap(), got.init_from.clone().unwrap());
    assert_eq!(fs::read(got.base.join("config.json")).unwrap(), b"config");
    assert_eq!(fs::read(got.base.join("model.safetensors")).unwrap(), b"weights");
    assert_eq!(fs::read(got.base.join("merges.txt")).unwrap(), b"");
    assert_eq!(fs::read(&got.train[0]).unwrap(), b"rows");
    assert_eq!(fs::read(&eval).unwrap(), b"other rows");
    assert_eq!(fs::read(init_from.join("adapter_model.safetensors")).unwrap(), b"adapter");
    assert_eq!(fs::read(got.tokens.clone().unwrap().join("key.safetensors")).unwrap(), b"other rows");
    assert!(got.train[0].ends_with("rows.jsonl") && eval.ends_with("rows.jsonl"));
    assert_eq!(store.offsets(), [0; 6]);
    assert_eq!(fs::read_dir(dir.path().join("partial")).unwrap().count(), 0);

    let modified = fs::metadata(got.base.join("model.safetensors")).unwrap().modified().unwrap();
    let again = cache(dir.path(), LARGE_CACHE).inputs(&requested, server.channel()).await.unwrap();
    assert_eq!((&again.base, &again.train[0], &again.eval), (&got.base, &got.train[0], &got.eval));
    assert_eq!(fs::metadata(again.base.join("model.safetensors")).unwrap().modified().unwrap(), modified);
    assert_eq!(store.offsets().len(), 6, "nothing was downloaded again");
}

#[tokio::test]
async fn a_broken_download_is_resumed() {
    let (dir, (store, server)) = (temp(), FakeArtifacts::serve().await);
    let rows = pattern(3_000_000);
    store.add(b"base");
    store.add(&rows);
    let (cache, requested) = (cache(dir.path(), LARGE_CACHE), inputs(b"base", &rows));
    drop(cache.inputs(&inputs(b"base", b"base"), server.channel()).await.unwrap());
    store.break_downloads_after(&[1_500_000]);
    let error = refusal(cache.inputs(&requested, server.channel()).await);
    assert!(error.is_transient(), "{error}");
    assert_eq!(error.to_string(), "train.jsonl: the connection broke");
    let part = dir.path().join("partial").join(DigestBuilder::of_bytes(&rows).hex()).join("content");
    until(|| fs::metadata(&part).unwrap().len() == 1_500_000).await;
    let got = cache.inputs(&requested, server.channel()).await.unwrap();
    assert_eq!(fs::read(&got.train[0]).unwrap(), rows);
    assert_eq!(store.offsets(), [0, 0, 1_500_000]);
}

#[tokio::test]
async fn a_cancelled_fetch_is_resumed() {
    let (dir, (store, server)) = (temp(), FakeArtifacts::serve().await);
    let rows = pattern(2_000_000);
    store.add(b"base");
    store.add(&rows);
    let (cache, requested) = (cache(dir.path(), LARGE_CACHE), inputs(b"base", &rows));
    store.stop_downloads();
    let part = dir.path().join("partial").join(DigestBuilder::of_bytes(&rows).hex()).join("content");
    let fetch = cache.inputs(&requested, server.channel());
    tokio::select! {
        _ = fetch => panic!("the download must not finish"),
        () = until(|| fs::metadata(&part).is_ok_and(|meta| meta.len() == 1 << 18)) => {}
    }
    store.continue_downloads();
    let got = timeout(TEST_TIMEOUT, cache.inputs(&requested, server.channel())).await.unwrap().unwrap();
    assert_eq!(fs::read(&got.train[0]).unwrap(), rows);
    assert_eq!(store.offsets(), [0, 0, 1 << 18]);
}

#[tokio::test]
async fn two_workers_fetch_a_file_once() {
    let (dir, (store, server)) = (temp(), FakeArtifacts::serve().await);
    let rows = pattern(1_000_000);
    store.add(b"base");
    store.add(&rows);
    let (one, two) = (cache(dir.path(), LARGE_CACHE), cache(dir.path(), LARGE_CACHE));
    let requested = inputs(b"base", &rows);
    store.stop_downloads();
    let both = async {
        tokio::join!(one.inputs(&requested, server.channel()), two.inputs(&requested, server.channel()))
    };
    let open = async {
        until(|| store.offsets().len() == 2).await;
        store.continue_downloads();
    };
    let ((one, two), ()) = timeout(TEST_TIMEOUT, async { tokio::join!(both, open) }).await.unwrap();
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!((&one.base, &one.train[0]), (&two.base, &two.train[0]));
    assert_eq!(fs::read(&one.train[0]).unwrap(), rows);
    assert_eq!(store.offsets(), [0, 0], "one download of the base, one of the rows");
}

#[tokio::test]
async fn corrupt_content_is_rejected() {
    let (dir, (store, server)) = (temp(), FakeArtifacts::serve().await);
    store.add(b"base");
    store.add_as(b"rows", b"swor");
    let (cache, requested) = (cache(dir.path(), LARGE_CACHE), inputs(b"base", b"rows"));
    // First another file, and then another file that claims to be the right one.
    for _ in 0..2 {
        let error = refusal(cache.inputs(&requested, server.channel()).await);
        assert!(error.is_transient());
        assert_eq!(error.to_string(), "train.jsonl: the received file is corrupt; try again");
        assert!(!tree(dir.path()).iter().any(|path| path.ends_with("train.jsonl")));
        store.corrupt_downloads();
    }
    store.add(b"rows");
    let got = cache.inputs(&requested, server.channel()).await.unwrap();
    assert_eq!(fs::read(&got.train[0]).unwrap(), b"rows");
}

#[tokio::test]
async fn a_file_of_another_length_is_fetched_again() {
    let (dir, (store, server)) = (temp(), FakeArtifacts::serve().await);
    store.add(b"base");
    store.add(b"rows");
    let (cache, requested) = (cache(dir.path(), LARGE_CACHE), inputs(b"base", b"rows"));
    for damage in [b"".as_slice(), b"row", b"rows and more"] {
        let got = cache.inputs(&requested, server.channel()).await.unwrap();
        assert_eq!(fs::read(&got.train[0]).unwrap(), b"rows");
        fs::write(&got.train[0], damage).unwrap();
    }
    let got = cache.inputs(&requested, server.channel()).await.unwrap();
    assert_eq!(fs::read(&got.train[0]).unwrap(), b"rows");
    assert_eq!(store.offsets().len(), 2 + 3);
}

#[tokio::test]
async fn names_that_could_leave_the_cache_are_refused() {
    let (parent, (store, server)) = (temp(), FakeArtifacts::serve().await);
    let dir = parent.path().join("cache");
    store.add(b"rows");
    let cache = cache(&dir, LARGE_CACHE);
    let long = "x".repeat(256);
    for name in ["", ".", "..", "../x", "a/b", "/x", ".hidden", "a\\b", "a\0b", "ä", "a b", "a\nb", &long] {
        let mut requested = inputs(b"rows", b"rows");
        requested.train = vec![stored_file(name, b"rows")];
        let error = refusal(cache.inputs(&requested, server.channel()).await).to_string();
        assert!(error.starts_with("data.train: ") && error.contains("is not a file name"), "{error}");
        assert!(error.lines().count() == 1 && error.len() < 300, "{error}");
    }
    let mut requested = inputs(b"rows", b"rows");
    requested.init_from = vec![stored_file("a", b"rows"), stored_file("a", b"rows")];
    let error = refusal(cache.inputs(&requested, server.channel()).await);
    assert_eq!(error.to_string(), "adapter.init_from: file a is listed twice");
    assert!(!error.is_transient());
    for sha256 in [vec![], vec![0; 31], b"../../../../../../../etc/xxxxxxxx".to_vec()] {
        requested = inputs(b"rows", b"rows");
        requested.train[0].digest.as_mut().unwrap().sha256 = sha256;
        let error = refusal(cache.inputs(&requested, server.channel()).await).to_string();
        assert_eq!(error, "data.train: file train.jsonl has no SHA-256");
    }
    for (requested, expected) in [
        (
            v1::Inputs { train: Vec::new(), ..inputs(b"rows", b"rows") },
            "data.train: is missing from the job's inputs",
        ),
        (
            v1::Inputs { base: None, ..inputs(b"rows", b"rows") },
            "model.base: is missing from the job's inputs",
        ),
    ] {
        assert_eq!(refusal(cache.inputs(&requested, server.channel()).await).to_string(), expected);
    }
    assert!(store.offsets().is_empty());
    assert!(tree(parent.path()).is_empty());
}

#[tokio::test]
async fn a_missing_file_is_a_permanent_error() {
    let (dir, (_store, server)) = (temp(), FakeArtifacts::serve().await);
    let error =
        refusal(cache(dir.path(), LARGE_CACHE).inputs(&inputs(b"base", b"rows"), server.channel()).await);
    assert_eq!(error.to_string(), "config.json: no such file");
    assert!(!error.is_transient());
    let unreachable =
        cache(dir.path(), LARGE_CACHE).inputs(&inputs(b"base", b"rows"), super::unreachable_channel()).await;
    assert!(refusal(unreachable).is_transient());
}

#[tokio::test]
async fn checkpoints_are_not_cached() {
    let (dir, (store, server)) = (temp(), FakeArtifacts::serve().await);
    let state = pattern(700_000);
    store.add(&state);
    let cache = cache(dir.path(), LARGE_CACHE);
    let checkpoint = v1::Checkpoint { step: 7, digest: Some(DigestBuilder::of_bytes(&state)) };
    store.break_downloads_after(&[300_000]);
    assert!(cache.checkpoint(&checkpoint, server.channel()).await.unwrap_err().is_transient());
    let part = dir.path().join("partial").join(DigestBuilder::of_bytes(&state).hex()).join("content");
    until(|| fs::metadata(&part).unwrap().len() == 300_000).await;
    assert_eq!(cache.checkpoint(&checkpoint, server.channel()).await.unwrap(), state);
    assert_eq!(store.offsets(), [0, 300_000]);
    assert!(tree(dir.path()).is_empty());

    let other = v1::Checkpoint { step: 8, digest: Some(DigestBuilder::of_bytes(b"nowhere")) };
    let error = cache.checkpoint(&other, server.channel()).await.unwrap_err();
    assert_eq!(error.to_string(), "step-8: no such file");
    let none = v1::Checkpoint { step: 8, digest: None };
    assert!(!cache.checkpoint(&none, server.channel()).await.unwrap_err().is_transient());
}

#[tokio::test]
async fn stale_partial_files_are_removed_at_start() {
    let dir = temp();
    drop(cache(dir.path(), LARGE_CACHE));
    let partial = |key: &str| {
        let path = dir.path().join("partial").join(key);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("content"), "x").unwrap();
        path
    };
    let (fresh, old, used) = (partial("fresh"), partial("old"), partial("used"));
    let empty = dir.path().join("sets/empty");
    fs::create_dir(&empty).unwrap();
    let past = SystemTime::now() - Duration::from_secs(7 * 24 * 3600);
    for path in [&old.join("content"), &used.join("content"), &old, &used, &empty] {
        fs::File::open(path).unwrap().set_modified(past).unwrap();
    }
    let lock = fs::File::open(&used).unwrap();
    lock.lock().unwrap();
    drop(cache(dir.path(), LARGE_CACHE));
    assert_eq!((fresh.exists(), old.exists(), used.exists(), empty.exists()), (true, false, true, false));
}
