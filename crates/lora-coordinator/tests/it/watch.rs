//! Watching a job.

use lora_proto::v1::{self, watch_job_response::Kind};
use tokio::time::timeout;
use tonic::Streaming;

use crate::fake::{Cluster, FakeWorker, WAIT_TIMEOUT, fast_config, job, train};

async fn next(stream: &mut Streaming<v1::WatchJobResponse>) -> Option<Kind> {
    let message = timeout(WAIT_TIMEOUT, stream.message()).await.expect("a message arrives").unwrap();
    message.map(|message| message.kind.unwrap())
}

fn number(kind: &Kind) -> (u64, u64) {
    match kind {
        Kind::Event(event) => (event.number, 0),
        Kind::Step(step) => (0, step.metrics.unwrap().step),
    }
}

#[tokio::test]
async fn watchers_see_the_same_and_resume_without_gaps_or_repeats() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let request = v1::WatchJobRequest { job_id: job_id.clone(), ..v1::WatchJobRequest::default() };
    let mut complete = cluster.jobs().watch_job(request.clone()).await.unwrap().into_inner();
    let mut interrupted = cluster.jobs().watch_job(request.clone()).await.unwrap().into_inner();
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    w0.steps(&a[0], 1..=20).await;
    let mut seen = Vec::new();
    let (mut from, mut after) = (1, 0);
    while after < 7 {
        let kind = next(&mut interrupted).await.unwrap();
        let (event, step) = number(&kind);
        (from, after) = (from.max(event + 1), after.max(step));
        seen.push(kind);
    }
    drop(interrupted);
    w0.steps(&a[0], 21..=300).await;
    cluster.result(&a[0], "receipt.json", b"{}").await;
    w0.finished(&a[0], 300, &["receipt.json"]).await;
    let rest = v1::WatchJobRequest { from_number: from, after_step: after, ..request };
    let mut resumed = cluster.jobs().watch_job(rest).await.unwrap().into_inner();
    while let Some(kind) = next(&mut resumed).await {
        seen.push(kind);
    }
    let mut all = Vec::new();
    while let Some(kind) = next(&mut complete).await {
        all.push(kind);
    }
    let sorted = |kinds: &[Kind]| {
        let mut numbers: Vec<(u64, u64)> = kinds.iter().map(number).collect();
        numbers.sort_unstable();
        numbers
    };
    assert_eq!(sorted(&seen), sorted(&all));
    assert_eq!(all.iter().filter(|kind| matches!(kind, Kind::Step(_))).count(), 300);
    cluster.stop().await;
}

#[tokio::test]
async fn a_slow_watcher_gets_the_first_available_event() {
    let mut config = fast_config();
    config.limits.retained_steps = 10;
    config.limits.retained_events = 4;
    let cluster = Cluster::start_with(config).await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    w0.steps(&a[0], 1..=500).await;
    w0.until_acked(500).await;
    let request = v1::WatchJobRequest { job_id: job_id.clone(), ..v1::WatchJobRequest::default() };
    let mut stream = cluster.jobs().watch_job(request).await.unwrap().into_inner();
    let status = timeout(WAIT_TIMEOUT, stream.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), tonic::Code::OutOfRange, "{status}");
    let details = tonic_types::StatusExt::get_error_details(&status);
    let info = details.error_info().unwrap();
    assert_eq!(info.reason, "EVENTS_FORGOTTEN");
    let from_number: u64 = info.metadata["first"].parse().unwrap();
    let request = v1::WatchJobRequest { job_id, from_number, after_step: 3, events_only: false };
    let mut stream = cluster.jobs().watch_job(request.clone()).await.unwrap().into_inner();
    let status = loop {
        match timeout(WAIT_TIMEOUT, stream.message()).await.unwrap() {
            Ok(message) => drop(message.unwrap()),
            Err(status) => break status,
        }
    };
    assert!(status.message().contains("step"), "{status}");
    let details = tonic_types::StatusExt::get_error_details(&status);
    let first: u64 = details.error_info().unwrap().metadata["first"].parse().unwrap();
    assert!(first > 400, "{first}");
    let request = v1::WatchJobRequest { after_step: first - 1, ..request };
    let mut stream = cluster.jobs().watch_job(request).await.unwrap().into_inner();
    loop {
        if let Kind::Step(step) = next(&mut stream).await.unwrap() {
            assert_eq!(step.metrics.unwrap().step, first);
            break;
        }
    }
    drop(stream);
    cluster.stop().await;
}

#[tokio::test]
async fn shutdown_ends_watches() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    cluster.until(&job_id, "queued").await;
    let request = v1::WatchJobRequest { job_id, from_number: 2, ..v1::WatchJobRequest::default() };
    let mut stream = cluster.jobs().watch_job(request).await.unwrap().into_inner();
    assert_eq!(number(&next(&mut stream).await.unwrap()).0, 2);
    cluster.stop().await;
    // The stream ends or fails, but does not hang.
    let _ = timeout(WAIT_TIMEOUT, stream.message()).await.expect("the stream ends");
}
