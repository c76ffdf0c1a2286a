//! Which jobs get workers, and the reasons why other jobs wait.

use lora_proto::v1::{self, Goal};

use crate::fake::{Cluster, FakeWorker, job, train};

#[tokio::test]
async fn two_jobs_on_one_worker_run_one_after_the_other() {
    let cluster = Cluster::start().await;
    let first = cluster.submit(&job(1, 1)).await;
    let second = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    assert_eq!(a[0].job_id, first);
    let waiting = cluster.until_that(&second, |job| !job.waiting_for.is_empty()).await;
    assert_eq!(waiting.waiting_for, "waits for 1 worker: none of 1 is free");
    cluster.cancel(&first).await.unwrap();
    w0.release().await;
    let b = w0.prepare(0).await;
    assert_eq!(b.job_id, second);
    assert_eq!(cluster.until(&second, "running").await.waiting_for, "");
    cluster.stop().await;
}

#[tokio::test]
async fn an_unsatisfiable_job_blocks_no_other_and_has_a_reason() {
    let cluster = Cluster::start().await;
    let large = cluster.submit(&job(4, 4)).await;
    let small = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    assert_eq!(w0.prepare(0).await.job_id, small);
    let waiting = cluster.until_that(&large, |job| job.waiting_for.contains("1 is connected")).await;
    assert!(waiting.waiting_for.contains("4 workers of one kind"), "{}", waiting.waiting_for);
    cluster.stop().await;
}

#[tokio::test]
async fn workers_that_compute_differently_do_not_share_a_job() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(2, 2)).await;
    let status = v1::WorkerStatus::default;
    let mut avx2 = FakeWorker::connect_as(&cluster, "w0", "1", "avx2", status()).await.unwrap();
    let _avx512 = FakeWorker::connect_as(&cluster, "w1", "1", "avx512", status()).await.unwrap();
    let waiting = cluster.until_that(&job_id, |job| job.waiting_for.contains("2 connected kinds")).await;
    assert_eq!(waiting.state, "queued");
    let mut third = FakeWorker::connect_as(&cluster, "w2", "1", "avx2", status()).await.unwrap();
    assert_eq!(avx2.prepare(0).await.peers, ["w0:1", "w2:1"]);
    third.prepare(0).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_higher_priority_comes_first() {
    let cluster = Cluster::start().await;
    let low = cluster.submit_with_priority(&job(1, 1), 0).await;
    let high = cluster.submit_with_priority(&job(1, 1), 5).await;
    cluster.until(&low, "queued").await;
    cluster.until(&high, "queued").await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    assert_eq!(w0.goal(Goal::Prepare).await.job_id, high);
    cluster.stop().await;
}

#[tokio::test]
async fn workers_are_listed_with_their_state_and_job() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    train(&mut [&mut w0], 3).await;
    let _w1 = FakeWorker::connect(&cluster, "w1").await;
    let mut client = cluster.jobs();
    let list = client.list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner().workers;
    let rows: Vec<_> =
        list.iter().map(|w| (w.name.as_str(), w.state.as_str(), w.job_id.clone(), w.rank)).collect();
    assert_eq!(rows, [("w0", "training", Some(job_id), Some(0)), ("w1", "idle", None, None)]);
    assert_eq!(list[0].completed_steps, 3);
    cluster.stop().await;
}

#[tokio::test]
async fn jobs_are_listed_newest_first_in_pages_and_by_state() {
    let cluster = Cluster::start().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(cluster.submit(&job(1, 1)).await);
    }
    cluster.cancel(&ids[1]).await.unwrap();
    ids.reverse();
    let mut seen = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = v1::ListJobsRequest { page_size: 2, page_token, ..v1::ListJobsRequest::default() };
        let page = cluster.jobs().list_jobs(request).await.unwrap().into_inner();
        assert!(page.jobs.len() <= 2);
        seen.extend(page.jobs.into_iter().map(|job| job.job_id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, ids);
    let request = v1::ListJobsRequest { states: vec!["cancelled".into()], ..v1::ListJobsRequest::default() };
    let cancelled = cluster.jobs().list_jobs(request).await.unwrap().into_inner().jobs;
    assert_eq!(cancelled.iter().map(|job| &job.job_id).collect::<Vec<_>>(), [&ids[3]]);
    cluster.stop().await;
}
