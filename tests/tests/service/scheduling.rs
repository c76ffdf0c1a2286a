//! The order in which jobs get workers.

use lora_e2e::{Finished, Fixture, TestService, loractl};
use lora_proto::v1::{self, job_event};
use serde_json::json;

#[test]
fn jobs_run_in_order_and_unsatisfiable_jobs_do_not_block_others() {
    let fixture = Fixture::with_steps(3);
    let large = Fixture::with_steps(3);
    large.ask_for_workers(3, 3);
    let service = TestService::start();
    let _worker = service.worker("w0");
    service.until_worker("w0", "idle");
    let impossible = service.submit(&large);
    let (first, second) = (service.submit(&fixture), service.submit(&fixture));
    service.until(&second, "to be queued", |job| job.state == "queued" && !job.waiting_for.is_empty());
    let status = service.run(&["status", &impossible]).expect_code(0).stdout;
    let waits = status.lines().find(|line| line.starts_with("waits for")).unwrap_or_default();
    assert!(waits.contains("3 ") && waits.contains("worker"), "{status}");
    let list = service.run(&["list", "--state", "queued", "-o", "json"]).expect_code(0).json();
    let listed: Vec<_> = list.as_array().unwrap().iter().map(|job| &job["job_id"]).collect();
    assert_eq!(listed, [&json!(second), &json!(impossible)], "the newest first");

    service.until_state(&second, "succeeded");
    let succeeded = |event: &job_event::Kind| match event {
        job_event::Kind::StateChanged(change) => change.state == "succeeded",
        _ => false,
    };
    let assigned = |event: &job_event::Kind| matches!(event, job_event::Kind::Assigned(_));
    let end_of_first = time_of(&service.api().events(&first), succeeded);
    let start_of_second = time_of(&service.api().events(&second), assigned);
    assert!(end_of_first <= start_of_second, "{end_of_first:?} {start_of_second:?}");
    assert_eq!(service.api().job(&impossible).unwrap().state, "queued");
    service.run(&["cancel", &impossible, "--wait"]).expect_code(0);
}

#[test]
fn a_job_with_a_higher_priority_runs_first() {
    let fixture = Fixture::with_steps(1);
    let service = TestService::start();
    let path = fixture.job();
    let submit = |priority: &str| {
        let arguments = ["submit", path.to_str().unwrap(), "--priority", priority, "-o", "json"];
        let job = service.run(&arguments).expect_code(0).json();
        job["job_id"].as_str().unwrap().to_owned()
    };
    let (low, high) = (submit("-1"), submit("1"));
    for job in [&low, &high] {
        service.until_state(job, "queued");
    }
    let _worker = service.worker("w0");
    service.until_state(&low, "succeeded");
    assert_eq!(service.api().job(&high).unwrap().state, "succeeded");
}

#[test]
fn a_job_is_placed_by_the_planned_memory() {
    let fixture = Fixture::with_steps(1);
    let service = TestService::start();
    let _small = service.worker_with("w0", &[("memory", "20971520")]);
    service.until_worker("w0", "idle");
    let workers = service.run(&["workers"]).expect_code(0).stdout;
    assert!(workers.contains("MEMORY") && workers.contains("20.00 MiB"), "{workers}");
    let listed = service.run(&["workers", "-o", "json"]).expect_code(0).json();
    assert_eq!((&listed[0]["memory"], &listed[0]["gpu"]), (&json!(20_971_520), &json!(false)));

    let path = fixture.job();
    let job = path.to_str().unwrap();
    let planned = Finished::run(loractl().args(["plan", job, "--cpu-memory", "20MiB"])).expect_code(1);
    let text = planned.error().unwrap();
    assert!(text.starts_with("a worker needs "), "{text}");
    let refused = service.until_state(&service.submit(&fixture), "failed");
    assert_eq!(refused.failure.unwrap().cause, text);

    let _whole_machine = service.worker("w1");
    service.until_worker("w1", "idle");
    let job = service.submit(&fixture);
    let done = service.until_state(&job, "succeeded");
    assert_eq!(done.generation, 1);
    assert_eq!(service.until_worker("w0", "idle").job_id, None);
}

/// The time of the first event for which `is` returns true: seconds, and the nanoseconds to add.
fn time_of(events: &[v1::JobEvent], is: impl Fn(&job_event::Kind) -> bool) -> (i64, i32) {
    let event = events.iter().find(|event| event.kind.as_ref().is_some_and(&is));
    let time = event.unwrap().time.unwrap();
    (time.seconds, time.nanos)
}
