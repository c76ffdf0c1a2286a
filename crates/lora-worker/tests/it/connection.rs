//! Connections that break and are reopened, and coordinators that refuse a worker.

use lora_proto::v1::{Goal, Hello, Phase};
use tonic::Status;

use crate::fake::FakeCoordinator;
use crate::job::{ENDLESS, assignment, spec};
use crate::worker::TestWorker;

#[tokio::test(flavor = "multi_thread")]
async fn a_reconnect_reports_the_job_and_the_unacknowledged_steps() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    let place = assignment(&fake, &spec(ENDLESS), &[&link]);
    link.direct(&place, Goal::Train).await;
    link.job(|job| job.completed_steps >= 3).await;
    link.acknowledge("job-1", 2).await;
    let instance_id = link.hello.instance_id.clone();
    drop(link);

    let mut link = fake.accept().await;
    assert_eq!(link.hello.instance_id, instance_id);
    let status = link.hello.status.clone().unwrap();
    assert_eq!((status.directive, status.job.unwrap().phase()), (0, Phase::Training), "training continued");
    let before = link.until(|status| status.directive == 0).await.job.unwrap();
    link.job(|job| job.completed_steps > before.completed_steps).await;
    let numbers = link.step_numbers();
    assert!(numbers[0] <= 3, "{numbers:?}");
    assert!(numbers.is_sorted_by(|a, b| a + 1 == *b), "{numbers:?}");

    // Sending the same directive again changes nothing.
    link.direct(&place, Goal::Train).await;
    let job = link.phase(Phase::Training).await;
    assert!(job.completed_steps >= before.completed_steps);
    worker.kill(link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_coordinator_is_refused() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept_unwelcomed().await;
    link.welcome(7).await;
    link.free().await;
    drop(link);
    let mut outdated = fake.accept_unwelcomed().await;
    outdated.welcome(6).await;
    assert_eq!(outdated.closed().await, None, "the worker sends it no status");
    let mut link = fake.accept_unwelcomed().await;
    link.welcome(7).await;
    link.free().await;
    worker.kill(link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_name_is_retried() {
    let mut fake = FakeCoordinator::start().await;
    fake.refuse(Some(Status::already_exists("another process has this name")));
    let worker = TestWorker::start(&fake, "w");
    fake.refused(|hello| hello.name == "w").await;
    fake.refuse(None);
    let mut link = fake.accept().await;
    link.free().await;
    worker.kill(link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn training_stops_after_the_orphan_timeout() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start_with(&fake, "w", |config| config.orphan_timeout_seconds = 0.2);
    let mut link = fake.accept().await;
    let place = assignment(&fake, &spec(ENDLESS), &[&link]);
    link.direct(&place, Goal::Train).await;
    link.job(|job| job.completed_steps >= 1).await;
    fake.refuse(Some(Status::unavailable("away")));
    drop(link);
    let phase =
        |hello: &Hello| hello.status.as_ref().and_then(|status| status.job.as_ref()).map(|job| job.phase());
    let stopped = fake.refused(|hello| phase(hello) == Some(Phase::Stopped)).await;
    let stopped = stopped.status.unwrap().job.unwrap();
    fake.refuse(None);
    let mut link = fake.accept().await;
    // The worker left its group, so training needs a newer generation.
    link.direct(&place, Goal::Train).await;
    let job = link.phase(Phase::Stopped).await;
    assert_eq!(job.completed_steps, stopped.completed_steps);
    worker.kill(link).await;
}
