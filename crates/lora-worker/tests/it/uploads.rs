//! Uploads that fail at first.

use lora_proto::v1::{Goal, Phase};
use tonic::Status;

use crate::fake::{FakeCoordinator, WorkerStream};
use crate::job::{ENDLESS, assignment, newer, spec};
use crate::worker::TestWorker;

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_retried_while_the_coordinator_is_away() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    let place = assignment(&fake, &spec(1), &[&link]);
    link.direct(&place, Goal::Prepare).await;
    link.phase(Phase::Prepared).await;
    fake.store.refuse_uploads([Status::unavailable("away"), Status::internal("the disk is slow")]);
    link.direct(&place, Goal::Save).await;
    link.phase(Phase::Saved).await;
    assert_eq!(fake.store.refusals_left(), 0);

    let again = newer(&place);
    fake.store.refuse_uploads([Status::unavailable("away")]);
    link.direct(&again, Goal::Train).await;
    let finished = link.phase(Phase::Finished).await;
    assert_eq!(fake.result_files(), finished.files);
    worker.kill(link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_upload_fails_the_job() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    fake.store.refuse_uploads([Status::resource_exhausted("the file is too large")]);
    link.direct(&assignment(&fake, &spec(1), &[&link]), Goal::Train).await;
    let failed = link.phase(Phase::Failed).await;
    assert_eq!(failed.cause, "adapter_model.safetensors: the file is too large");
    worker.kill(link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_of_an_older_generation_waits_for_the_newer_ones_directive() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    let place = assignment(&fake, &spec(1), &[&link]);
    fake.store.refuse_uploads(std::iter::repeat_n(Status::failed_precondition("generation 1 is over"), 50));
    link.direct(&place, Goal::Save).await;
    link.phase(Phase::Saving).await;
    link.direct(&newer(&place), Goal::Prepare).await;
    link.phase(Phase::Prepared).await;
    worker.kill(link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_are_uploaded_during_training() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    let mut job = spec(ENDLESS);
    job.training.save_steps = 2;
    fake.store.refuse_uploads([Status::resource_exhausted("no room"), Status::unavailable("away")]);
    link.direct(&assignment(&fake, &job, &[&link]), Goal::Train).await;
    link.job(|job| job.phase() == Phase::Training && job.completed_steps >= 1).await;
    let notice = |link: &WorkerStream| {
        let rows = link.steps.iter().flat_map(|steps| &steps.steps);
        rows.map(|row| row.notice.clone()).find(|notice| !notice.is_empty())
    };
    while notice(&link).is_none() {
        link.phase(Phase::Training).await;
    }
    assert_eq!(notice(&link).unwrap(), "checkpoint of step 2: no room");
    // The saved checkpoint is the newest that waited when the coordinator was back.
    let step = link.phase(Phase::Training).await.completed_steps;
    let saved = fake.uploaded_checkpoint().await;
    assert!(saved.is_multiple_of(2) && saved > 2, "{saved} at step {step}");
    worker.kill(link).await;
}
