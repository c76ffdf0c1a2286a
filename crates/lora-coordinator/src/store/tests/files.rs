use super::*;

fn file(name: &str, digest: &v1::FileDigest) -> v1::StoredFile {
    v1::StoredFile { name: name.to_owned(), digest: Some(digest.clone()) }
}

fn reading(id: &str, train: &v1::FileDigest, eval: &v1::FileDigest) -> JobRow {
    let inputs =
        v1::Inputs { train: vec![file("t", train)], eval: Some(file("e", eval)), ..v1::Inputs::default() };
    JobRow { inputs, ..job(id) }
}

#[tokio::test]
async fn equal_content_is_stored_once() {
    let fixture = Fixture::new().await;
    let digest = fixture.add_input(b"hello").await;
    assert_eq!(fixture.add_input(b"hello").await, digest);
    assert_eq!(digest, lora_proto::DigestBuilder::of_bytes(b"hello"));
    assert_eq!(fixture.names(OBJECTS), [digest.hex()]);
    assert_eq!(fixture.names(STAGING), [""; 0]);
    let path = fixture.store.object_path(&digest.sha256).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), b"hello");
    assert_eq!(fixture.store.object_digest(&digest.sha256).await.unwrap(), Some(digest.clone()));
    assert_eq!(fixture.store.object_digest(&[0; 32]).await.unwrap(), None);
    assert_eq!(fixture.store.object_path(&[0; 31]), None);

    let other = lora_proto::DigestBuilder::of_bytes(b"other");
    let longer = v1::FileDigest { size: 6, ..digest.clone() };
    let asked = vec![digest, other.clone(), longer.clone()];
    assert_eq!(fixture.store.find_missing(asked).await.unwrap(), [other, longer]);
}

#[tokio::test]
async fn an_empty_file_is_stored() {
    let fixture = Fixture::new().await;
    let digest = fixture.add_input(b"").await;
    assert_eq!(digest.size, 0);
    assert_eq!(fixture.names(OBJECTS), [digest.hex()]);
}

#[tokio::test]
async fn an_upload_that_ends_early_leaves_nothing() {
    let fixture = Fixture::new().await;
    let mut staged = fixture.store.stage().await.unwrap();
    staged.write(b"half").await.unwrap();
    assert_eq!(fixture.names(STAGING).len(), 1);
    drop(staged);
    assert_eq!(fixture.names(STAGING), [""; 0]);

    // An upload that a crash interrupted is removed at the next start.
    let staging = fixture.dir.path().join(STAGING);
    std::fs::write(staging.join("upload-7"), "half").unwrap();
    std::fs::create_dir(staging.join("dir")).unwrap();
    std::os::unix::fs::symlink(fixture.dir.path(), staging.join("dir/link")).unwrap();
    let fixture = fixture.reopened().await;
    assert_eq!(fixture.names(STAGING), [""; 0]);
    assert!(fixture.dir.path().join(DATABASE).exists());
}

#[tokio::test]
async fn an_upload_that_is_cancelled_while_its_file_is_created_leaves_nothing() {
    let fixture = Fixture::new().await;
    for _ in 0..20 {
        tokio::select! {
            biased;
            staged = fixture.store.stage() => drop(staged),
            () = std::future::ready(()) => {}
        }
    }
    // A later file is created after the earlier ones, in the same queue.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while fixture.store.stage().await.is_ok() && !fixture.names(STAGING).is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "{:?}", fixture.names(STAGING));
    }
}

#[tokio::test]
async fn a_submit_needs_its_inputs_and_keeps_them() {
    let fixture = Fixture::new().await;
    let (train, eval) = (fixture.add_input(b"train").await, lora_proto::DigestBuilder::of_bytes(b"eval"));
    let job = reading("one", &train, &eval);
    let inserted = fixture.store.insert_job(&job, vec![notice("n")]).await.unwrap();
    assert_eq!(inserted, InsertOutcome::MissingObjects(vec![eval.clone()]));
    assert_eq!(fixture.store.load_job("one").await.unwrap(), None);

    fixture.add_input(b"eval").await;
    let unused = fixture.add_input(b"unused").await;
    fixture.add(job).await;
    let hour = Duration::from_secs(3600);
    assert_eq!(fixture.store.collect_garbage(hour).await.unwrap(), 0);
    assert_eq!(fixture.names(OBJECTS).len(), 3);
    assert_eq!(fixture.store.collect_garbage(Duration::ZERO).await.unwrap(), 1);
    let mut kept = vec![train.hex(), eval.hex()];
    kept.sort();
    assert_eq!(fixture.names(OBJECTS), kept);
    assert_eq!(fixture.store.object_digest(&unused.sha256).await.unwrap(), None);
    assert_eq!(fixture.store.find_missing(vec![train, unused.clone(), eval]).await.unwrap(), [unused]);
}

#[tokio::test]
async fn a_lost_or_truncated_file_is_missing_until_it_is_uploaded_again() {
    let fixture = Fixture::new().await;
    let (train, eval) = (fixture.add_input(b"train").await, fixture.add_input(b"eval").await);
    let job = reading("one", &train, &eval);
    let asked = vec![train.clone(), eval.clone()];
    let path = fixture.store.object_path(&eval.sha256).unwrap();
    for damage in ["remove", "truncate"] {
        match damage {
            "remove" => std::fs::remove_file(&path).unwrap(),
            _ => std::fs::write(&path, "ev").unwrap(),
        }
        let missing = fixture.store.find_missing(asked.clone()).await.unwrap();
        assert_eq!(missing, std::slice::from_ref(&eval), "{damage}");
        let inserted = fixture.store.insert_job(&job, vec![notice("n")]).await.unwrap();
        assert_eq!(inserted, InsertOutcome::MissingObjects(vec![eval.clone()]), "{damage}");
        fixture.add_input(b"eval").await;
        assert_eq!(fixture.store.find_missing(asked.clone()).await.unwrap(), []);
    }
    fixture.add(job).await;
    assert_eq!(std::fs::read(&path).unwrap(), b"eval");
}

#[tokio::test]
async fn a_collection_during_a_submit_never_leaves_a_job_without_its_file() {
    let fixture = Fixture::new().await;
    for round in 0..20 {
        let (train, eval) = (fixture.add_input(b"train").await, fixture.add_input(b"eval").await);
        let job = reading(&format!("job-{round}"), &train, &eval);
        let (inserted, collected) = tokio::join!(
            fixture.store.insert_job(&job, vec![notice("n")]),
            fixture.store.collect_garbage(Duration::ZERO)
        );
        collected.unwrap();
        match inserted.unwrap() {
            InsertOutcome::New(_) => assert_eq!(fixture.names(OBJECTS).len(), 2),
            InsertOutcome::MissingObjects(missing) => assert_eq!(missing, [train, eval]),
            InsertOutcome::Existing(job) => panic!("{job:?}"),
        }
    }
}

#[tokio::test]
async fn only_the_newest_checkpoints_stay() {
    let fixture = Fixture::new().await;
    let mut row = job("one");
    row.spec.training.get_or_insert_default().save_total_limit = Some(2);
    let mut row = fixture.add(JobRow { state: JobState::Running, generation: 4, ..row }).await;
    assert_eq!(fixture.store.newest_checkpoint("one").await.unwrap(), None);
    // The first checkpoint is also an input, and a client asks for the second one.
    let first = fixture.add_input(b"1").await;
    fixture.add(reading("two", &first, &first)).await;
    let mut saved = Vec::new();
    for step in 1..=4 {
        let (digest, committed) =
            fixture.commit(checkpoint("one", 4, step), step.to_string().as_bytes()).await;
        assert_eq!(committed, Ok(()));
        if step == 2 {
            assert_eq!(fixture.store.find_missing(vec![digest.clone()]).await.unwrap(), []);
        }
        saved.push(digest);
    }
    let newest = v1::Checkpoint { step: 4, digest: Some(saved[3].clone()) };
    assert_eq!(fixture.store.newest_checkpoint("one").await.unwrap(), Some(newest));
    assert_eq!(fixture.names(OBJECTS).len(), 4);
    fixture.commit(checkpoint("one", 4, 5), b"5").await.1.unwrap();
    assert_eq!(fixture.store.object_digest(&saved[2].sha256).await.unwrap(), None);
    assert_eq!(fixture.names(OBJECTS).len(), 4);
    assert_eq!(fixture.store.collect_garbage(Duration::ZERO).await.unwrap(), 1);
    assert_eq!(fixture.names(OBJECTS).len(), 3);
    assert_eq!(fixture.watch_items("one", 6).await, (1..=6).map(WatchedItem::Event).collect::<Vec<_>>());

    // A repeated upload, as after a lost answer, adds no event.
    fixture.commit(checkpoint("one", 4, 5), b"5").await.1.unwrap();
    row.state = JobState::Failed;
    fixture.store.save_job(&row, Vec::new()).await.unwrap();
    assert_eq!(fixture.watch_items("one", 99).await.len(), 6);
}

#[tokio::test]
async fn stale_artifacts_are_rejected() {
    let fixture = Fixture::new().await;
    let mut row = fixture.add(JobRow { state: JobState::Running, generation: 2, ..job("one") }).await;
    for artifact in [checkpoint("one", 1, 5), result("one", 1, "a.json"), checkpoint("one", 3, 5)] {
        let (_, committed) = fixture.commit(artifact, b"late").await;
        assert_eq!(committed, Err(ArtifactRefusal::StaleGeneration { current: 2 }));
    }
    assert_eq!(fixture.commit(checkpoint("two", 2, 5), b"lost").await.1, Err(ArtifactRefusal::UnknownJob));
    for state in JobState::ALL.into_iter().filter(|state| !state.is_terminal()) {
        row.state = state;
        fixture.store.save_job(&row, Vec::new()).await.unwrap();
        let (_, committed) = fixture.commit(checkpoint("one", 2, 5), state.name().as_bytes()).await;
        match state.is_active() && state != JobState::Cancelling {
            true => assert_eq!(committed, Ok(())),
            false => assert_eq!(committed, Err(ArtifactRefusal::NotActive { state })),
        }
    }
    // Each checkpoint of step 5 replaced the one before. The newest has the bytes of the last state
    // that accepts checkpoints.
    let newest = fixture.store.newest_checkpoint("one").await.unwrap().unwrap();
    assert_eq!(newest.digest, Some(lora_proto::DigestBuilder::of_bytes(b"pausing")));
    assert_eq!(fixture.names(OBJECTS), [newest.digest.unwrap().hex()]);
    assert_eq!(fixture.names(STAGING), [""; 0]);
    assert_eq!(fixture.watch_items("one", 99).await.len(), 1 + 5);

    // A job that cannot be resumed keeps no checkpoint.
    row.state = JobState::Cancelled;
    fixture.store.save_job(&row, Vec::new()).await.unwrap();
    let (_, committed) = fixture.commit(checkpoint("one", 2, 6), b"late").await;
    assert_eq!(committed, Err(ArtifactRefusal::NotActive { state: JobState::Cancelled }));
    assert_eq!(fixture.store.newest_checkpoint("one").await.unwrap(), None);
    assert_eq!(fixture.store.collect_garbage(Duration::ZERO).await.unwrap(), 1);
    assert_eq!(fixture.names(OBJECTS), [""; 0]);
}

#[tokio::test]
async fn a_commit_completes_if_its_caller_is_dropped() {
    let fixture = Fixture::new().await;
    fixture.add_running("one").await;
    let staged = fixture.staged(b"state").await;
    let digest = staged.digest.clone();
    let artifact = checkpoint("one", 1, 5);
    {
        let mut commit = Box::pin(fixture.store.commit_artifact(&artifact, staged));
        assert!(futures_util::poll!(&mut commit).is_pending());
    }
    assert_eq!(fixture.watch_items("one", 2).await, [WatchedItem::Event(1), WatchedItem::Event(2)]);
    assert_eq!(fixture.names(OBJECTS), [digest.hex()]);
}
