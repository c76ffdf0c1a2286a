//! Jobs from their submit to their result, including pauses.

use lora_proto::v1::{self, Goal, Phase, job_event};

use crate::fake::{Cluster, FakeWorker, TwoWorkerJob, job, train};

#[tokio::test]
async fn a_job_succeeds_and_its_workers_take_the_next() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(2, 2)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let mut w1 = FakeWorker::connect(&cluster, "w1").await;
    let a = train(&mut [&mut w0, &mut w1], 0).await;
    assert_eq!((a[0].rank, a[1].rank, a[0].generation), (0, 1, 1));
    assert_eq!(a[0].peers, ["w0:1", "w1:1"]);
    assert_eq!((&a[0].token, a[0].token.len()), (&a[1].token, 64));
    assert_eq!(a[0].job, Some(v1::JobSpec::try_from(&job(2, 2)).unwrap()));
    for step in 1..=3 {
        w0.steps(&a[0], step..=step).await;
        cluster.checkpoint(&a[0], step, format!("state {step}").as_bytes()).await;
    }
    w1.until_acked(3).await;
    assert_eq!(cluster.job(&job_id).await.completed_steps, 3);
    assert_eq!(cluster.job(&job_id).await.checkpoint_step, Some(3));
    cluster.result(&a[0], "adapter_model.safetensors", b"adapter").await;
    cluster.result(&a[0], "receipt.json", b"{}").await;
    w1.finished(&a[1], 3, &[]).await;
    w0.finished(&a[0], 3, &["adapter_model.safetensors", "receipt.json"]).await;

    let states = cluster.states(&job_id).await;
    assert_eq!(states, ["validating", "queued", "preparing", "running", "succeeded"]);
    let done = cluster.job(&job_id).await;
    let names: Vec<&str> = done.result.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["adapter_model.safetensors", "job.yaml", "metrics.jsonl", "receipt.json"]);
    assert_eq!(cluster.download(&job_id, "adapter_model.safetensors").await, b"adapter");
    let metrics = String::from_utf8(cluster.download(&job_id, "metrics.jsonl").await).unwrap();
    assert_eq!(metrics.lines().count(), 3);
    assert!(metrics.starts_with("{\"step\":1,\"loss\":1.0,"), "{metrics}");
    let yaml = String::from_utf8(cluster.download(&job_id, "job.yaml").await).unwrap();
    assert!(yaml.contains("name: dates"), "{yaml}");

    let second = cluster.submit(&job(2, 2)).await;
    w0.release().await;
    w1.release().await;
    let b = train(&mut [&mut w0, &mut w1], 0).await;
    assert_eq!(b[0].job_id, second);
    cluster.stop().await;
}

#[tokio::test]
async fn a_paused_job_resumes_from_its_checkpoint() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { job_id, mut w0, mut w1, a } = TwoWorkerJob::training(&cluster, &job(2, 2)).await;
    w0.steps(&a[0], 1..=2).await;
    assert_eq!(cluster.pause(&job_id).await.unwrap().state, "pausing");
    for (worker, assignment) in [(&mut w0, &a[0]), (&mut w1, &a[1])] {
        worker.goal(Goal::Stop).await;
        worker.phase(assignment, Phase::Stopped, 2).await;
    }
    w0.goal(Goal::Save).await;
    assert_eq!(cluster.job(&job_id).await.state, "pausing");
    cluster.checkpoint(&a[0], 2, b"two steps").await;
    w0.phase(&a[0], Phase::Saved, 2).await;
    w0.release().await;
    w1.release().await;
    let paused = cluster.until(&job_id, "paused").await;
    assert_eq!((paused.checkpoint_step, paused.workers.len()), (Some(2), 0));
    assert_eq!(cluster.pause(&job_id).await.unwrap().state, "paused");

    let resumed = cluster.resume(&job_id, Some(1)).await.unwrap();
    assert_eq!(resumed.spec.unwrap().workers.unwrap().max, Some(1));
    let b = w0.prepare(2).await;
    let checkpoint = b.checkpoint.clone().unwrap();
    assert_eq!((b.generation, checkpoint.step), (2, 2));
    w0.goal(Goal::Train).await;
    w0.steps(&b, 3..=3).await;
    cluster.result(&b, "receipt.json", b"{}").await;
    w0.finished(&b, 3, &["receipt.json"]).await;
    cluster.until(&job_id, "succeeded").await;
    let metrics = cluster.download(&job_id, "metrics.jsonl").await;
    assert_eq!(String::from_utf8(metrics).unwrap().lines().count(), 3);
    let error = cluster.pause(&job_id).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
    cluster.stop().await;
}

#[tokio::test]
async fn a_pause_before_the_first_step_needs_no_checkpoint() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    cluster.until(&job_id, "queued").await;
    assert_eq!(cluster.pause(&job_id).await.unwrap().state, "paused");
    cluster.resume(&job_id, None).await.unwrap();
    let mut worker = FakeWorker::connect(&cluster, "w0").await;
    let a = worker.goal(Goal::Prepare).await;
    worker.phase(&a, Phase::Preparing, 0).await;
    cluster.pause(&job_id).await.unwrap();
    worker.release().await;
    assert_eq!(cluster.until(&job_id, "paused").await.checkpoint_step, None);
    cluster.stop().await;
}

#[tokio::test]
async fn a_pause_at_the_last_step_succeeds_the_job() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    cluster.pause(&job_id).await.unwrap();
    w0.steps(&a[0], 1..=9).await;
    w0.phase(&a[0], Phase::Exporting, 9).await;
    cluster.result(&a[0], "receipt.json", b"{}").await;
    w0.finished(&a[0], 9, &["receipt.json"]).await;
    cluster.until(&job_id, "succeeded").await;
    cluster.stop().await;
}

#[tokio::test]
async fn an_incomplete_result_fails_the_job() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    w0.finished(&a[0], 0, &["adapter_model.safetensors"]).await;
    let failed = cluster.until(&job_id, "failed").await;
    assert!(failed.failure.unwrap().cause.contains("adapter_model.safetensors"));
    assert!(failed.result.is_empty());
    cluster.stop().await;
}

#[tokio::test]
async fn a_job_error_fails_the_job_and_it_can_be_resumed() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    w0.steps(&a[0], 1..=4).await;
    cluster.checkpoint(&a[0], 3, b"three").await;
    w0.until_acked(4).await;
    w0.failed(&a[0], "the loss is not finite").await;
    let failure = cluster.until(&job_id, "failed").await.failure.unwrap();
    assert_eq!((failure.worker.as_deref(), failure.rank, failure.completed_steps), (Some("w0"), Some(0), 4));
    assert_eq!(failure.cause, "the loss is not finite");
    w0.release().await;
    cluster.resume(&job_id, None).await.unwrap();
    let b = w0.prepare(3).await;
    assert_eq!(b.checkpoint.unwrap().step, 3);
    assert_eq!(cluster.until(&job_id, "running").await.failure, None);
    cluster.stop().await;
}

#[tokio::test]
async fn the_log_has_all_events_in_order() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    cluster.checkpoint(&a[0], 1, b"one").await;
    cluster.result(&a[0], "receipt.json", b"{}").await;
    w0.finished(&a[0], 0, &["receipt.json"]).await;
    let word = |event: &job_event::Kind| match event {
        job_event::Kind::StateChanged(change) => change.state.clone(),
        job_event::Kind::Assigned(assigned) => format!("assigned {}", assigned.generation),
        job_event::Kind::BaseReady(base) => format!("base {}", base.sha256),
        job_event::Kind::Prepared(prepared) => format!("prepared {}", prepared.facts.unwrap().total_steps),
        job_event::Kind::CheckpointSaved(saved) => format!("checkpoint {}", saved.step),
        job_event::Kind::ResultSaved(saved) => format!("result of {}", saved.files.len()),
        other => format!("{other:?}"),
    };
    let words: Vec<String> = cluster.events(&job_id).await.iter().map(word).collect();
    let expected = [
        "validating",
        "queued",
        "assigned 1",
        "preparing",
        "base ba5e",
        "prepared 9",
        "running",
        "checkpoint 1",
        "result of 3",
        "succeeded",
    ];
    assert_eq!(words, expected);
    cluster.stop().await;
}
