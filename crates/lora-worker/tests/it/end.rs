//! The ways in which a worker ends.

use lora_proto::v1::{Goal, Phase};
use tonic::Status;

use crate::fake::FakeCoordinator;
use crate::job::{ENDLESS, assignment, spec};
use crate::worker::TestWorker;

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_worker_waits_for_its_release() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    let place = assignment(&fake, &spec(ENDLESS), &[&link]);
    link.direct(&place, Goal::Train).await;
    link.job(|job| job.completed_steps >= 1).await;
    worker.stop.cancel();
    let draining = link.until(|status| status.draining).await;
    assert_eq!(draining.job.unwrap().phase(), Phase::Training, "it trains until it is released");
    link.direct(&place, Goal::Stop).await;
    link.phase(Phase::Stopped).await;
    link.release().await;
    let last = link.closed().await.unwrap();
    assert_eq!((last.job, last.draining), (None, true), "the last status reports that the memory is free");
    drop(link);
    worker.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_worker_exits_on_request() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    link.free().await;
    worker.stop.cancel();
    assert!(link.closed().await.unwrap().draining);
    drop(link);
    worker.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_worker_without_a_coordinator_stops_at_a_step_boundary() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    link.direct(&assignment(&fake, &spec(ENDLESS), &[&link]), Goal::Train).await;
    link.job(|job| job.completed_steps >= 1).await;
    fake.refuse(Some(Status::unavailable("away")));
    drop(link);
    fake.refused(|hello| hello.status.as_ref().is_some_and(|status| status.job.is_some())).await;
    worker.stop.cancel();
    worker.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_worker_exits_after_the_drain_timeout() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start_with(&fake, "w", |config| config.drain_timeout_seconds = 0.2);
    let mut link = fake.accept().await;
    link.direct(&assignment(&fake, &spec(ENDLESS), &[&link]), Goal::Train).await;
    link.phase(Phase::Training).await;
    worker.stop.cancel();
    let last = link.closed().await.unwrap();
    assert_eq!(last.job.unwrap().phase(), Phase::Training);
    drop(link);
    worker.ended().await;
}
