use futures_util::TryStreamExt;

use super::super::artifacts::MissingFile;
use super::*;

/// A job after its last step, with two files uploaded and one from an earlier group.
async fn exported(fixture: &Fixture) -> JobRow {
    let mut row = fixture.add_running("one").await;
    fixture.commit(result("one", 1, "old.json"), b"old").await.1.unwrap();
    fixture.commit(result("one", 1, "a.json"), b"a of the first group").await.1.unwrap();
    row.generation = 2;
    fixture.store.save_job(&row, Vec::new()).await.unwrap();
    fixture.commit(result("one", 2, "a.json"), b"a").await.1.unwrap();
    fixture.commit(result("one", 2, "b.json"), b"b").await.1.unwrap();
    fixture.commit(result("one", 2, "extra.json"), b"extra").await.1.unwrap();
    let quiet = v1::StepReport { logged: false, ..step(2) };
    let evaluated = v1::StepMetrics { eval_loss: Some(0.5), ..step(3).metrics.unwrap() };
    let evaluated = v1::StepReport { metrics: Some(evaluated), ..step(3) };
    fixture.store.add_steps("one", &[step(1), quiet, evaluated]).await.unwrap();
    row
}

fn files(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn a_result_has_the_announced_files_and_those_of_the_coordinator() {
    let fixture = Fixture::new().await;
    let row = exported(&fixture).await;
    assert_eq!(fixture.store.result_file("one", "a.json").await.unwrap(), None);
    let exported = Some(v1::ExportedAdapter { step: 3, eval_loss: Some(0.5), stopped_early: false });
    let done = JobRow { state: JobState::Succeeded, completed_steps: 3, exported, ..row };
    let events = vec![changed(JobState::Succeeded)];
    let stored =
        fixture.store.commit_result(&done, &files(&["b.json", "a.json"]), events).await.unwrap().unwrap();
    let names: Vec<_> = stored.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["a.json", "b.json", "job.yaml", "metrics.jsonl"]);

    let fixture = fixture.reopened().await;
    let read = async |name: &str| {
        let digest = fixture.store.result_file("one", name).await.unwrap().unwrap();
        std::fs::read_to_string(fixture.store.object_path(&digest.sha256).unwrap()).unwrap()
    };
    assert_eq!((read("a.json").await, read("b.json").await), ("a".into(), "b".into()));
    assert_eq!(
        read("metrics.jsonl").await,
        "{\"step\":1,\"loss\":1.1,\"grad_norm\":0.0,\"learning_rate\":0.0,\"epoch\":0.0,\"num_tokens\":0,\"eval_loss\":null}\n\
         {\"step\":3,\"loss\":3.1,\"grad_norm\":0.0,\"learning_rate\":0.0,\"epoch\":0.0,\"num_tokens\":0,\"eval_loss\":0.5}\n"
    );
    let written: lora_spec::JobSpec = serde_saphyr::from_str(&read("job.yaml").await).unwrap();
    assert_eq!(written, lora_spec::JobSpec::try_from(done.spec.clone()).unwrap());
    assert_eq!(fixture.store.result_file("one", "extra.json").await.unwrap(), None);
    assert_eq!(fixture.store.result_file("one", "old.json").await.unwrap(), None);
    assert_eq!(fixture.names(OBJECTS).len(), 4);
    assert_eq!(fixture.store.collect_garbage(Duration::ZERO).await.unwrap(), 0);

    assert_eq!(fixture.store.load_job("one").await.unwrap(), Some(done));
    assert_eq!(fixture.store.job_message("one").await.unwrap().unwrap().result, stored);
    let watch = fixture.store.watch("one".into(), 2, 9, false);
    let kind = |item: v1::WatchJobResponse| match item.kind {
        Some(watch_job_response::Kind::Event(event)) => event.kind.unwrap(),
        other => panic!("{other:?}"),
    };
    let kinds: Vec<_> = watch.map_ok(kind).try_collect().await.unwrap();
    let saved = v1::ResultSaved { files: stored, exported };
    assert_eq!(kinds, [job_event::Kind::ResultSaved(saved), changed(JobState::Succeeded)]);
}

#[tokio::test]
async fn a_result_with_a_file_missing_changes_nothing() {
    let fixture = Fixture::new().await;
    let row = exported(&fixture).await;
    let before = (fixture.names(OBJECTS), fixture.names(STAGING));
    let done = JobRow { state: JobState::Succeeded, ..row.clone() };
    // The first file was never uploaded, the second only in an earlier generation.
    for missing in ["none.json", "old.json"] {
        let wanted = files(&["a.json", missing]);
        let stored =
            fixture.store.commit_result(&done, &wanted, vec![changed(JobState::Succeeded)]).await.unwrap();
        assert_eq!(stored, Err(MissingFile(missing.to_owned())));
    }
    assert_eq!(fixture.store.load_job("one").await.unwrap(), Some(row));
    assert_eq!((fixture.names(OBJECTS), fixture.names(STAGING)), before);
    assert_eq!(fixture.watch_items_from("one", 1, 9, false, 1).await.unwrap(), [WatchedItem::Event(1)]);
    // The job can still succeed.
    let stored = fixture.store.commit_result(&done, &files(&["a.json"]), vec![notice("done")]).await.unwrap();
    assert_eq!(stored.unwrap().len(), 3);
    assert_eq!(fixture.watch_items("one", 99).await.len(), 3 + 3);
}

#[tokio::test]
async fn uploaded_result_files_are_removed_on_failure() {
    let fixture = Fixture::new().await;
    let row = exported(&fixture).await;
    fixture.commit(checkpoint("one", 2, 3), b"state").await.1.unwrap();
    fixture.store.save_job(&JobRow { state: JobState::Failed, ..row }, Vec::new()).await.unwrap();
    fixture.store.collect_garbage(Duration::ZERO).await.unwrap();
    assert_eq!(fixture.names(OBJECTS), [lora_proto::DigestBuilder::of_bytes(b"state").hex()]);
}
