//! Cancelling jobs in several states.

use lora_e2e::{Fixture, Signal, TestService};
use serde_json::json;

#[test]
fn a_preparing_job_is_cancelled_after_its_worker_releases_it() {
    let fixture = Fixture::with_steps(1);
    // The worker sends no heartbeats while it is stopped.
    let service = TestService::with(&["workers.lease_seconds=600"]);
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
fn a_training_job_is_cancelled_and_its_worker_gets_the_next_job() {
    let (long, short) = (Fixture::with_short_steps(), Fixture::with_steps(1));
    let service = TestService::start();
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
