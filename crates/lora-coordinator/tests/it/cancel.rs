//! Cancelling a job in each of its states.

use lora_proto::v1::{Goal, Phase};

use crate::fake::{Cluster, FakeWorker, TwoWorkerJob, job, train};

#[tokio::test]
async fn a_queued_job_is_cancelled_immediately() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    assert_eq!(cluster.cancel(&job_id).await.unwrap().state, "cancelled");
    // Cancelling again changes nothing.
    assert_eq!(cluster.cancel(&job_id).await.unwrap().state, "cancelled");
    assert!(cluster.resume(&job_id, None).await.is_err());
    let _worker = FakeWorker::connect(&cluster, "w0").await;
    let other = cluster.submit(&job(1, 1)).await;
    cluster.until(&other, "preparing").await;
    assert_eq!(cluster.job(&job_id).await.state, "cancelled");
    cluster.stop().await;
}

/// Cancels a job. Checks that the job is `cancelled` only after every worker has released it.
async fn expect_cancelled_after_release(cluster: &Cluster, job_id: &str, workers: &mut [&mut FakeWorker]) {
    assert_eq!(cluster.cancel(job_id).await.unwrap().state, "cancelling");
    let last = workers.len() - 1;
    for (index, worker) in workers.iter_mut().enumerate() {
        while worker.next().await.assignment.is_some() {}
        assert_eq!(
            cluster.job(job_id).await.state,
            "cancelling",
            "worker {index} of {last} still has the job"
        );
        worker.say(None).await;
    }
    cluster.until(job_id, "cancelled").await;
}

#[tokio::test]
async fn a_preparing_job_is_cancelled_after_its_workers_release_it() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(2, 2)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let mut w1 = FakeWorker::connect(&cluster, "w1").await;
    let a = w0.goal(Goal::Prepare).await;
    w0.phase(&a, Phase::Preparing, 0).await;
    // The other worker has not reported the job yet.
    w1.goal(Goal::Prepare).await;
    expect_cancelled_after_release(&cluster, &job_id, &mut [&mut w0, &mut w1]).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_running_job_is_cancelled_after_its_workers_release_it() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { job_id, mut w0, mut w1, .. } = TwoWorkerJob::training(&cluster, &job(2, 2)).await;
    expect_cancelled_after_release(&cluster, &job_id, &mut [&mut w0, &mut w1]).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_recovering_job_is_cancelled_after_its_workers_release_it() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { job_id, mut w0, w1, a } = TwoWorkerJob::training(&cluster, &job(1, 2)).await;
    w1.disconnect();
    w0.broken(&a[0], 0, "its peer is gone", &[]).await;
    let b = w0.goal(Goal::Prepare).await;
    assert_eq!(b.generation, 2);
    assert_eq!(cluster.job(&job_id).await.state, "recovering");
    expect_cancelled_after_release(&cluster, &job_id, &mut [&mut w0]).await;
    cluster.stop().await;
}

#[tokio::test]
async fn an_exporting_job_is_cancelled_after_its_workers_release_it() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    w0.phase(&a[0], Phase::Exporting, 9).await;
    cluster.result(&a[0], "receipt.json", b"{}").await;
    assert_eq!(cluster.cancel(&job_id).await.unwrap().state, "cancelling");
    // The rest of its result comes too late.
    let late =
        cluster.upload(&a[0], lora_proto::v1::job_artifact::Name::ResultFile("late".into()), b"x").await;
    assert!(late.unwrap_err().to_string().contains("cancelling"));
    w0.finished(&a[0], 9, &["receipt.json"]).await;
    w0.release().await;
    let job = cluster.until(&job_id, "cancelled").await;
    assert!(job.result.is_empty());
    cluster.stop().await;
}

#[tokio::test]
async fn a_lost_worker_delays_cancel_by_its_lease_at_most() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    train(&mut [&mut w0], 0).await;
    cluster.cancel(&job_id).await.unwrap();
    w0.disconnect();
    cluster.until(&job_id, "cancelled").await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_paused_job_can_be_cancelled_and_a_succeeded_one_cannot() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    cluster.pause(&job_id).await.unwrap();
    assert_eq!(cluster.cancel(&job_id).await.unwrap().state, "cancelled");
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    cluster.result(&a[0], "receipt.json", b"{}").await;
    w0.finished(&a[0], 0, &["receipt.json"]).await;
    cluster.until(&job_id, "succeeded").await;
    let error = cluster.cancel(&job_id).await.unwrap_err();
    assert!(error.message().contains("is succeeded and cannot be cancelled"), "{error}");
    cluster.stop().await;
}
