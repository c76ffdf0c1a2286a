//! A paused job survives the end of all processes.

use lora_e2e::{Fixture, TestService};
use serde_json::json;

use crate::{STEPS, expect_reference_outcome, groups};

#[test]
fn a_paused_job_resumes_after_everything_was_killed() {
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(2, 2);
    let mut service = TestService::start();
    let workers = [service.worker("w0"), service.worker("w1")];
    let job = service.submit(&fixture);
    service.until_step(&job, 5);
    let paused = service.run(&["pause", &job, "--wait", "-o", "json"]).expect_code(0).json();
    let paused = &paused[0];
    let step = paused["completed_steps"].as_u64().unwrap();
    assert_eq!((&paused["state"], &paused["checkpoint_step"]), (&json!("paused"), &json!(step)));
    assert!((5..STEPS).contains(&step), "it was paused after step {step}");
    for name in ["w0", "w1"] {
        service.until_worker(name, "idle");
    }
    service.kill();
    workers.into_iter().for_each(lora_e2e::Worker::kill);

    service.restart();
    assert_eq!(service.until_state(&job, "paused").completed_steps, step);
    // The new worker simulates another machine. The number of workers changes too.
    let _worker = service.worker("w2");
    service.run(&["resume", &job, "--workers", "1", "--watch"]).expect_code(0);
    expect_reference_outcome(&service, &job, &fixture.path("out"));
    let groups = groups(&service, &job);
    assert_eq!(groups.len(), 2, "{groups:?}");
    assert_eq!((groups[1].checkpoint_step, &groups[1].workers), (Some(step), &vec!["w2".to_owned()]));
}
