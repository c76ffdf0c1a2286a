//! Cancelling, whatever the job is about to do.

use lora_e2e::{Fixture, Service, Signal};
use serde_json::json;

#[test]
fn a_job_that_is_being_prepared_is_cancelled_once_its_worker_says_so() {
    let fixture = Fixture::of_steps(1);
    // The worker is silent for as long as it is stopped.
    let service = Service::with(&["workers.lease_seconds=600"]);
    let worker = service.worker("w0");
    service.until_worker("w0", "idle");
    worker.daemon.signal(Signal::STOP);
    let job = service.submit(&fixture);
    service.until_state(&job, "preparing");
    let answer = service.run(&["cancel", &job, "-o", "json"]).expect_code(0).json();
    assert_eq!(answer[0]["state"], "cancelling");
    worker.daemon.signal(Signal::CONT);
    let answer = service.run(&["cancel", &job, "--wait", "-o", "json"]).expect_code(0).json();
    assert_eq!(answer[0]["state"], "cancelled");
    service.until_worker("w0", "idle");
    service.result(&service.submit(&fixture), &fixture.path("next"));
}

#[test]
fn a_job_that_trains_is_cancelled_and_its_worker_takes_the_next() {
    let (long, short) = (Fixture::of_short_steps(), Fixture::of_steps(1));
    let service = Service::start();
    let _worker = service.worker("w0");
    let submitted = service.running(&["submit", long.job().to_str().unwrap(), "--watch"]);
    let job = lora_e2e::until("the job", || {
        let list = service.run(&["list", "-o", "json"]).expect_code(0).json();
        Some(list[0]["job_id"].as_str()?.to_owned())
    });
    service.until_step(&job, 3);
    let answer = service.run(&["cancel", &job, "--wait", "-o", "json"]).expect_code(0).json();
    assert_eq!(answer[0]["state"], "cancelled");
    assert!(answer[0]["completed_steps"].as_u64().unwrap() < crate::STEPS, "it was cancelled too late");
    submitted.wait().expect_code(4);

    // Nothing of the job is left on the worker.
    let workers = service.run(&["workers", "-o", "json"]).expect_code(0).json();
    assert_eq!((&workers[0]["state"], &workers[0]["job_id"]), (&json!("idle"), &json!(null)), "{workers}");
    let refused = service.run(&["resume", &job]).expect_code(1);
    assert!(refused.error().unwrap_or_default().contains("is cancelled"), "{}", refused.stderr);

    let next = service.submit(&short);
    service.result(&next, &short.path("out"));
    assert_eq!(service.run(&["watch", &job]).code, Some(4));
}
