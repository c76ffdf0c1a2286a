//! The coordinator over its real API, with workers that have no engine.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod fake;

use std::path::Path;

use fake::{Cluster, FakeWorker, job};
use lora_proto::DigestBuilder;
use lora_proto::v1::artifacts_client::ArtifactsClient;
use lora_proto::v1::{self, artifact_name, download_response, job_command, job_event, job_report};
use tonic::Code;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Brings a job of these workers to where it trains.
async fn start(workers: &mut [FakeWorker]) -> Vec<v1::Assignment> {
    let mut assignments = Vec::new();
    for worker in workers.iter_mut() {
        let assignment = worker.assignment().await;
        worker.prepared(&assignment, assignment.checkpoint_step.unwrap_or(0)).await;
        assignments.push(assignment);
    }
    for worker in workers.iter_mut() {
        assert!(matches!(worker.command().await, job_command::Kind::Start(_)));
    }
    assignments
}

async fn two_workers(cluster: &Cluster) -> Vec<FakeWorker> {
    vec![FakeWorker::connect(cluster, "w0").await, FakeWorker::connect(cluster, "w1").await]
}

#[tokio::test]
async fn a_job_runs_to_its_result() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let out = temp.path().join("out");
    let job_id = cluster.submit(&job(2), &out, false).await.unwrap();
    let mut workers = two_workers(&cluster).await;
    let a = start(&mut workers).await;
    assert_eq!((a[0].rank, a[1].rank), (0, 1));
    assert_eq!(a[0].peers, ["w0:1", "w1:1"]);
    assert_eq!((&a[0].token, a[0].token.len()), (&a[1].token, 64));
    assert_eq!(a[0].job, Some(v1::JobSpec::try_from(&job(2)).unwrap()));
    for step in 1..=3 {
        workers[0].step(&a[0], step).await;
        cluster.upload_checkpoint(&a[0], step, format!("state {step}").as_bytes()).await;
    }
    cluster.upload_result(&a[0], "adapter_model.safetensors", b"adapter").await;
    cluster.upload_result(&a[0], "receipt.json", b"{}").await;
    workers[1].ended(&a[1], "succeeded", &[]).await;
    assert!(!out.join("receipt.json").exists());
    workers[0].ended(&a[0], "succeeded", &["adapter_model.safetensors", "receipt.json"]).await;

    let (states, failure) = cluster.outcome(&job_id).await;
    assert_eq!(states, ["validating", "queued", "preparing", "running", "succeeded"]);
    assert_eq!(failure, None);
    assert_eq!(
        names(&out),
        ["adapter_model.safetensors", "checkpoints", "job.yaml", "metrics.jsonl", "receipt.json"]
    );
    assert_eq!(names(&out.join("checkpoints")), ["step-00000002.safetensors", "step-00000003.safetensors"]);
    assert_eq!(std::fs::read(out.join("checkpoints/step-00000003.safetensors")).unwrap(), b"state 3");
    assert_eq!(std::fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines().count(), 3);
    let events = cluster.events(&job_id).await;
    assert!(events.iter().any(|e| matches!(e, job_event::Kind::ResultSaved(r) if r.files.len() == 2)));

    // The same workers take a second job once they have let go of the first.
    let second = cluster.submit(&job(2), &temp.path().join("second"), false).await.unwrap();
    for (worker, assignment) in workers.iter_mut().zip(&a) {
        worker.release(assignment).await;
    }
    let b = start(&mut workers).await;
    assert_eq!((&b[0].job_id, b[1].rank), (&second, 1));
    cluster.stop().await;
}

#[tokio::test]
async fn an_upload_with_the_wrong_hash_or_size_leaves_nothing() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    cluster.submit(&job(1), temp.path(), false).await.unwrap();
    let mut workers = [FakeWorker::connect(&cluster, "w0").await];
    let a = start(&mut workers).await;
    let name = artifact_name::Name::CheckpointStep(1);
    let right = DigestBuilder::of(b"state");
    for wrong in [
        DigestBuilder::of(b"stats"),
        v1::FileDigest { size: 4, ..right.clone() },
        v1::FileDigest { size: 6, ..right.clone() },
    ] {
        let status = cluster.upload(&a[0], name.clone(), b"state", wrong).await.unwrap_err();
        assert_eq!(status.code(), Code::DataLoss, "{status}");
    }
    assert!(names(&temp.path().join("checkpoints")).is_empty());
    assert!(names(&temp.path().join(".staging")).is_empty());
    cluster.upload(&a[0], name, b"state", right).await.unwrap();
    assert_eq!(names(&temp.path().join("checkpoints")), ["step-00000001.safetensors"]);
    cluster.stop().await;
}

#[tokio::test]
async fn an_upload_must_have_a_plain_name() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    cluster.submit(&job(1), &temp.path().join("out"), false).await.unwrap();
    let mut workers = [FakeWorker::connect(&cluster, "w0").await];
    let a = start(&mut workers).await;
    for name in ["../x", "a/b", "", ".hidden", "/etc/x", "a b"] {
        let result = artifact_name::Name::ResultFile(name.into());
        let status = cluster.upload(&a[0], result, b"x", DigestBuilder::of(b"x")).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name:?}: {status}");
    }
    assert_eq!(names(temp.path()), ["out"]);
    cluster.stop().await;
}

#[tokio::test]
async fn an_older_generation_writes_nothing() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let job_id = cluster.submit(&job(1), temp.path(), false).await.unwrap();
    let mut workers = [FakeWorker::connect(&cluster, "w0").await];
    let a = start(&mut workers).await;
    let stale = v1::Assignment { generation: a[0].generation - 1, ..a[0].clone() };
    let name = artifact_name::Name::CheckpointStep(1);
    let status = cluster.upload(&stale, name, b"x", DigestBuilder::of(b"x")).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    workers[0].step(&stale, 3).await;
    workers[0].failed(&stale, "too late", &[]).await;
    workers[0].step(&a[0], 1).await;
    cluster.upload_checkpoint(&a[0], 1, b"x").await;
    let job = cluster.jobs().get_job(v1::GetJobRequest { job_id }).await.unwrap().into_inner();
    assert_eq!((job.state.as_str(), job.generation), ("running", 1));
    cluster.stop().await;
    assert_eq!(std::fs::read_to_string(temp.path().join("metrics.jsonl")).unwrap().lines().count(), 1);
}

#[tokio::test]
async fn a_worker_that_dies_fails_the_job_with_its_name_rank_and_step() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let job_id = cluster.submit(&job(2), temp.path(), false).await.unwrap();
    let mut workers = two_workers(&cluster).await;
    let a = start(&mut workers).await;
    workers[0].step(&a[0], 1).await;
    cluster.upload_checkpoint(&a[0], 1, b"x").await;
    // Rank 0 sees it first, and blames rank 1.
    workers[0].failed(&a[0], "rank 1 closed the connection", &[1]).await;
    drop(workers.pop());
    let (states, failure) = cluster.outcome(&job_id).await;
    assert_eq!(states.last().unwrap(), "failed");
    let failure = failure.unwrap();
    assert_eq!((failure.worker.as_deref(), failure.rank, failure.completed_steps), (Some("w1"), Some(1), 1));
    assert!(failure.cause.contains("worker was lost"), "{failure:?}");
    workers[0].release(&a[0]).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_worker_that_blames_a_live_peer_is_believed_after_a_while() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let job_id = cluster.submit(&job(2), temp.path(), false).await.unwrap();
    let mut workers = two_workers(&cluster).await;
    let a = start(&mut workers).await;
    workers[1].failed(&a[1], "rank 0 made no progress", &[0]).await;
    let failure = cluster.outcome(&job_id).await.1.unwrap();
    assert_eq!((failure.worker.as_deref(), failure.rank), (Some("w0"), Some(0)));
    assert_eq!(failure.cause, "as w1 (rank 1) reports: rank 0 made no progress");
    for (worker, assignment) in workers.iter_mut().zip(&a) {
        worker.release(assignment).await;
    }
    cluster.stop().await;
}

#[tokio::test]
async fn an_error_while_preparing_fails_the_job_and_creates_nothing() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let out = temp.path().join("out");
    let job_id = cluster.submit(&job(2), &out, false).await.unwrap();
    let mut workers = two_workers(&cluster).await;
    let (a, b) = (workers[0].assignment().await, workers[1].assignment().await);
    workers[0].prepared(&a, 0).await;
    workers[1].failed(&b, "train.jsonl:3: broken row", &[]).await;
    let (states, failure) = cluster.outcome(&job_id).await;
    assert_eq!(states, ["validating", "queued", "preparing", "failed"]);
    assert_eq!(failure.unwrap().cause, "train.jsonl:3: broken row");
    workers[0].release(&a).await;
    workers[1].release(&b).await;
    assert!(!out.exists());
    cluster.stop().await;
}

#[tokio::test]
async fn a_running_job_pauses_at_a_checkpoint_and_resumes_from_it() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let job_id = cluster.submit(&job(1), temp.path(), false).await.unwrap();
    let mut workers = [FakeWorker::connect(&cluster, "w0").await];
    let a = start(&mut workers).await;
    workers[0].step(&a[0], 1).await;
    assert_eq!(cluster.pause(&job_id).await.unwrap().state, "pausing");
    assert!(matches!(workers[0].command().await, job_command::Kind::Pause(_)));
    workers[0].step(&a[0], 2).await;
    cluster.upload_checkpoint(&a[0], 2, b"two steps").await;
    workers[0].step(&a[0], 3).await;
    workers[0].ended(&a[0], "paused", &[]).await;
    let states = cluster.outcome(&job_id).await.0;
    assert_eq!(states, ["validating", "queued", "preparing", "running", "pausing", "paused"]);
    assert_eq!(cluster.pause(&job_id).await.unwrap().state, "paused");
    workers[0].release(&a[0]).await;

    let status = cluster.submit(&job(1), temp.path(), false).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("--resume"), "{status}");
    let resumed = cluster.submit(&job(1), temp.path(), true).await.unwrap();
    let b = start(&mut workers).await;
    assert_eq!((&b[0].job_id, b[0].checkpoint_step), (&resumed, Some(2)));
    let name = Some(v1::ArtifactName { name: Some(artifact_name::Name::CheckpointStep(2)) });
    let request = v1::DownloadRequest { job_id: resumed.clone(), name };
    let mut client = ArtifactsClient::new(cluster.channel.clone());
    let mut download = client.download(request).await.unwrap().into_inner();
    let chunk = download.message().await.unwrap().unwrap().kind.unwrap();
    assert_eq!(chunk, download_response::Kind::Chunk(b"two steps".to_vec()));
    let trailer = download.message().await.unwrap().unwrap().kind.unwrap();
    assert_eq!(trailer, download_response::Kind::Trailer(DigestBuilder::of(b"two steps")));
    workers[0].step(&b[0], 3).await;
    cluster.upload_result(&b[0], "receipt.json", b"{}").await;
    workers[0].ended(&b[0], "succeeded", &["receipt.json"]).await;
    assert_eq!(cluster.outcome(&resumed).await.0.last().unwrap(), "succeeded");
    let metrics = std::fs::read_to_string(temp.path().join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 3, "{metrics}");
    assert_eq!(cluster.pause(&resumed).await.unwrap_err().code(), Code::FailedPrecondition);
    cluster.stop().await;
}

#[tokio::test]
async fn a_pause_before_training_waits_for_the_workers_to_let_go() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let out = temp.path().join("out");
    let job_id = cluster.submit(&job(1), &out, false).await.unwrap();
    let mut worker = FakeWorker::connect(&cluster, "w0").await;
    let assignment = worker.assignment().await;
    assert_eq!(cluster.pause(&job_id).await.unwrap().state, "pausing");
    worker.prepared(&assignment, 0).await;
    worker.release(&assignment).await;
    let states = cluster.outcome(&job_id).await.0;
    assert_eq!(states, ["validating", "queued", "preparing", "pausing", "paused"]);
    assert!(!out.exists());
    cluster.stop().await;
}

#[tokio::test]
async fn a_result_without_its_receipt_is_no_result() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let job_id = cluster.submit(&job(1), temp.path(), false).await.unwrap();
    let mut workers = [FakeWorker::connect(&cluster, "w0").await];
    let a = start(&mut workers).await;
    cluster.upload_result(&a[0], "adapter_model.safetensors", b"adapter").await;
    workers[0].ended(&a[0], "succeeded", &["adapter_model.safetensors"]).await;
    let failure = cluster.outcome(&job_id).await.1.unwrap();
    assert!(failure.cause.contains("receipt.json"), "{failure:?}");
    assert!(!temp.path().join("adapter_model.safetensors").exists());
    cluster.stop().await;
}

#[tokio::test]
async fn workers_that_compute_differently_do_not_share_a_job() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let job_id = cluster.submit(&job(2), &temp.path().join("out"), false).await.unwrap();
    let _w0 = FakeWorker::connect_as(&cluster, "w0", "engine 1 avx2").await.unwrap();
    let _w1 = FakeWorker::connect_as(&cluster, "w1", "engine 1 avx512").await.unwrap();
    let cause = cluster.outcome(&job_id).await.1.unwrap().cause;
    assert!(
        cause.contains("w0 is \"engine 1 avx2\"") && cause.contains("w1 is \"engine 1 avx512\""),
        "{cause}"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn a_second_worker_of_a_live_name_is_refused() {
    let cluster = Cluster::start().await;
    let first = FakeWorker::connect(&cluster, "w0").await;
    let status = FakeWorker::connect_as(&cluster, "w0", "fake").await.err().unwrap();
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    drop(first);
    cluster.stop().await;
}

#[tokio::test]
async fn a_worker_that_breaks_the_protocol_is_cut_off_and_the_job_fails() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let job_id = cluster.submit(&job(1), temp.path(), false).await.unwrap();
    let mut workers = [FakeWorker::connect(&cluster, "w0").await];
    let a = start(&mut workers).await;
    let nonsense = v1::StepFinished { metrics: None, logged: true, reduced_bytes: 0 };
    workers[0].report(&a[0], job_report::Kind::StepFinished(nonsense)).await;
    let cause = cluster.outcome(&job_id).await.1.unwrap().cause;
    assert!(cause.contains("a step without metrics"), "{cause}");
    cluster.stop().await;
}

#[tokio::test]
async fn a_bad_submit_names_the_field() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let out = temp.path().join("out");
    let mut bad = job(1);
    bad.training.learning_rate = f64::NAN;
    for (job, dir, field) in [
        (bad, out.as_path(), "training.learning_rate"),
        (job(9), out.as_path(), "workers.max"),
        (job(1), Path::new("relative"), "output_dir"),
    ] {
        let status = cluster.submit(&job, dir, false).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(field), "{status}");
    }
    let status = cluster.submit(&job(1), &out, true).await.unwrap_err();
    assert!(status.message().contains("no unfinished run"), "{status}");
    assert_eq!(cluster.pause("nobody").await.unwrap_err().code(), Code::NotFound);
    assert!(!out.exists());
    cluster.stop().await;
}

#[tokio::test]
async fn workers_are_told_to_end_and_watchers_let_go_at_shutdown() {
    let (cluster, temp) = (Cluster::start().await, tempfile::tempdir().unwrap());
    let job_id = cluster.submit(&job(2), &temp.path().join("out"), false).await.unwrap();
    let mut worker = FakeWorker::connect(&cluster, "w0").await;
    let request = v1::WatchJobRequest { job_id, from_number: 2 };
    let mut events = cluster.jobs().watch_job(request).await.unwrap().into_inner();
    assert_eq!(events.message().await.unwrap().unwrap().number, 2);
    cluster.handle.shutdown();
    let message = worker.next().await;
    assert!(matches!(message, v1::coordinator_message::Kind::Shutdown(_)), "{message:?}");
    assert!(events.message().await.unwrap().is_none());
    drop((worker, events));
    cluster.stop().await;
}
