//! A coordinator that ends and starts again.

use lora_e2e::{Fixture, TestService, json_lines, until};

use crate::{STEPS, expect_reference_outcome, groups, lost};

#[test]
fn workers_continue_without_a_coordinator_and_are_recovered() {
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(2, 2);
    let mut service = TestService::start();
    let mut workers = [service.worker("w0"), service.worker("w1")];
    let job = service.submit(&fixture);
    service.until_step(&job, 5);
    service.kill();
    for worker in &workers {
        let before = worker.steps();
        until("steps without a coordinator", || (worker.steps() >= before + 3).then_some(()));
    }
    service.restart();
    expect_reference_outcome(&service, &job, &fixture.path("out"));
    let groups = groups(&service, &job);
    assert_eq!((groups.len(), groups[0].generation), (1, 1), "{groups:?}");
    assert_eq!(lost(&service, &job), Vec::<String>::new());
    assert!(workers.iter_mut().all(|worker| !worker.daemon.has_ended()));
    assert_eq!(service.api().job(&job).unwrap().generation, 1);
}

#[test]
fn a_graceful_shutdown_leaves_workers_and_watchers_waiting() {
    let fixture = Fixture::with_short_steps();
    let mut service = TestService::start();
    let worker = service.worker("w0");
    let job = service.submit(&fixture);
    let watching = service.running(&["watch", &job, "-o", "json"]);
    service.until_step(&job, 5);
    service.terminate().expect_code(0);
    // After a graceful shutdown the database is a single file, which can be copied.
    let log = service.state_dir().join("coordinator.db-wal");
    assert_eq!(std::fs::metadata(log).map_or(0, |log| log.len()), 0);
    let before = worker.steps();
    until("a step without a coordinator", || (worker.steps() > before).then_some(()));
    until("that the watcher notices", || watching.stderr().contains("lost the coordinator").then_some(()));
    service.restart();
    let watched = json_lines(&watching.wait().expect_code(0).stdout);
    let steps =
        watched.iter().filter(|item| item["type"] == "step").map(|item| item["step"].as_u64().unwrap());
    assert_eq!(steps.collect::<Vec<_>>(), (1..=STEPS).collect::<Vec<_>>());
    expect_reference_outcome(&service, &job, &fixture.path("out"));
    assert_eq!(groups(&service, &job).len(), 1);
    // The worker has no job, so it ends at once.
    worker.daemon.terminate().expect_code(0);
}
