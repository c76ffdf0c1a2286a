//! The base stays in a worker's memory between jobs.

use lora_e2e::{Fixture, TestService};
use lora_proto::v1::{self, job_event};

#[test]
fn a_second_job_on_the_same_base_skips_loading_and_one_on_another_does_not() {
    let fixture = Fixture::with_steps(1);
    let service = TestService::start();
    let _worker = service.worker("w0");
    let first = run(&service, &fixture);
    assert!(!first.cached);
    // Another directory with the same contents is the same base.
    fixture.copy_base("copy");
    fixture.edit("job.yaml", "base: base", "base: copy");
    let second = run(&service, &fixture);
    assert!(second.cached);
    assert_eq!(second.sha256, first.sha256);
    fixture.edit("copy/config.json", "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 2e-05");
    let third = run(&service, &fixture);
    assert!(!third.cached);
    assert_ne!(third.sha256, first.sha256);
    assert_eq!([first.worker, second.worker, third.worker], ["w0", "w0", "w0"]);
}

/// Runs the job to its end and returns what the worker reported about the base.
fn run(service: &TestService, fixture: &Fixture) -> v1::BaseReady {
    let job = service.submit(fixture);
    service.until_state(&job, "succeeded");
    let ready = |event: v1::JobEvent| match event.kind {
        Some(job_event::Kind::BaseReady(ready)) => Some(ready),
        _ => None,
    };
    service.api().events(&job).into_iter().find_map(ready).unwrap()
}
