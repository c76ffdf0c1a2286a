//! The phases of a job on one worker.

use lora_proto::v1::{Goal, Phase};

use crate::fake::FakeCoordinator;
use crate::job::{ENDLESS, assignment, newer, over_rows, spec};
use crate::worker::TestWorker;

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_prepared_trained_and_its_result_uploaded() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    let hello = &link.hello;
    assert_eq!((hello.name.as_str(), hello.status.clone().unwrap().job), ("w", None));
    assert!(hello.numerics_id.starts_with("loractl ") && hello.peer_address.starts_with("127.0.0.1:"));
    let place = assignment(&fake, &spec(3), &[&link]);
    link.direct(&place, Goal::Prepare).await;
    let prepared = link.phase(Phase::Prepared).await;
    assert_eq!((prepared.generation, prepared.completed_steps), (1, 0));
    assert_eq!(prepared.facts.unwrap().total_steps, 3);
    assert!(!prepared.base.unwrap().cached);

    link.direct(&place, Goal::Train).await;
    let finished = link.phase(Phase::Finished).await;
    assert_eq!(finished.completed_steps, 3);
    assert_eq!(link.step_numbers(), [1, 2, 3], "steps come before the status that follows them");
    let rows: Vec<_> = link.steps.iter().flat_map(|steps| &steps.steps).collect();
    assert!(rows.iter().all(|row| row.logged && row.metrics.unwrap().loss.is_finite()));
    assert_eq!(fake.result_files(), finished.files);
    assert!(finished.files.contains(&"adapter_model.safetensors".to_owned()), "{:?}", finished.files);
    assert_eq!(finished.files.last().unwrap(), "receipt.json");

    link.release().await;
    link.free().await;
    let mut other = place.clone();
    other.job_id = "job-2".into();
    link.direct(&other, Goal::Prepare).await;
    let prepared = link.phase(Phase::Prepared).await;
    assert!(prepared.base.unwrap().cached, "the base stayed in memory");
    worker.kill(link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_row_fails_the_job_with_the_jobs_own_path() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    let rows = "{\"prompt\": \"one\", \"completion\": \"1\"}\n{\"prompt\"\n";
    let place = over_rows(&fake, &spec(3), rows, &[&link]);
    link.direct(&place, Goal::Prepare).await;
    let failed = link.phase(Phase::Failed).await;
    assert!(failed.cause.starts_with("/home/me/rows.jsonl:2"), "{}", failed.cause);

    // The failed job left no state from which another generation could continue.
    let again = newer(&place);
    link.direct(&again, Goal::Prepare).await;
    link.job(|job| job.phase() == Phase::Failed && job.generation == 2).await;

    let mut other = assignment(&fake, &spec(3), &[&link]);
    other.job_id = "job-2".into();
    link.direct(&other, Goal::Prepare).await;
    link.phase(Phase::Prepared).await;
    worker.kill(link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_above_the_memory_limit_fails_before_the_base_is_read() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start_with(&fake, "w", |config| config.memory = 30 << 20);
    let mut link = fake.accept().await;
    assert_eq!((link.hello.memory, link.hello.gpu), (30 << 20, false));
    let place = assignment(&fake, &spec(1), &[&link]);
    link.direct(&place, Goal::Prepare).await;
    let failed = link.phase(Phase::Failed).await;
    let (needs, would) = failed.cause.split_once(" of memory, more than 30.00 MiB; ").unwrap();
    assert!(needs.starts_with("a worker needs "), "{needs}");
    let remedy = "no activation_checkpointing, micro_batch_size or quantization would make it fit, the base \
                  alone takes ";
    assert!(would.starts_with(remedy), "{would}");
    assert_eq!(failed.base, None);
    worker.kill(link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_released_in_the_middle_of_training() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    let place = assignment(&fake, &spec(ENDLESS), &[&link]);
    link.direct(&place, Goal::Train).await;
    let training = link.job(|job| job.phase() == Phase::Training && job.completed_steps >= 2).await;
    assert!(training.seconds_in_phase < 60.0, "the time counts from the last step");
    link.release().await;
    link.free().await;
    worker.kill(link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_state_is_resumed() {
    let mut fake = FakeCoordinator::start().await;
    let worker = TestWorker::start(&fake, "w");
    let mut link = fake.accept().await;
    let first = assignment(&fake, &spec(ENDLESS), &[&link]);
    link.direct(&first, Goal::Train).await;
    link.job(|job| job.completed_steps >= 2).await;
    link.direct(&first, Goal::Stop).await;
    let stopped = link.phase(Phase::Stopped).await.completed_steps;
    assert_eq!(link.step_numbers(), (1..=stopped).collect::<Vec<_>>());
    link.direct(&first, Goal::Save).await;
    assert_eq!(link.phase(Phase::Saved).await.completed_steps, stopped);
    let checkpoint = fake.checkpoint(stopped);
    link.release().await;
    link.free().await;

    link.steps.clear();
    let mut resumed = newer(&first);
    resumed.checkpoint = Some(checkpoint);
    link.direct(&resumed, Goal::Prepare).await;
    assert_eq!(link.phase(Phase::Prepared).await.completed_steps, stopped);
    link.direct(&resumed, Goal::Train).await;
    let training = link.job(|job| job.completed_steps > stopped).await;
    assert_eq!((training.phase(), training.generation), (Phase::Training, 2));
    let expected: Vec<u64> = (1..).take(link.step_numbers().len()).collect();
    assert_eq!(link.step_numbers(), expected, "no step was stored, so all are sent again");
    assert!(expected.len() as u64 > stopped);
    worker.kill(link).await;
}
