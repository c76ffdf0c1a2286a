//! Workers that are lost, leave or join while a job trains.

use lora_e2e::{Fixture, Signal, TestService, Worker};

use crate::{expect_reference_outcome, groups, lost};

#[test]
fn a_killed_worker_is_replaced() {
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(2, 2);
    let service = TestService::start();
    let (_w0, w1) = (service.worker("w0"), service.worker("w1"));
    let job = service.submit(&fixture);
    service.until_step(&job, 5);
    w1.kill();
    service.until_state(&job, "waiting");
    let status = service.run(&["status", &job]).expect_code(0).stdout;
    assert!(status.lines().any(|line| line.starts_with("waits for") && line.contains("worker")), "{status}");
    let _w2 = service.worker("w2");
    expect_reference_outcome(&service, &job, &fixture.path("out"));

    assert_eq!(lost(&service, &job), ["w1"]);
    let groups = groups(&service, &job);
    assert_eq!(groups.iter().map(|group| group.generation).collect::<Vec<_>>(), [1, 2], "{groups:?}");
    let mut members = groups[1].workers.clone();
    members.sort();
    assert_eq!(members, ["w0", "w2"]);
    let logs = service.run(&["logs", &job]).expect_code(0).stdout;
    assert!(logs.contains("lost w1 (rank ") && logs.contains("because w1 (rank "), "{logs}");
}

#[test]
fn the_group_continues_without_rank_0() {
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(1, 2);
    let service = TestService::start();
    let mut workers = pair(&service);
    let job = service.submit(&fixture);
    let first = service.until_step(&job, 5).workers[0].clone();
    take(&mut workers, &first).kill();
    expect_reference_outcome(&service, &job, &fixture.path("out"));
    assert_eq!(lost(&service, &job), [first]);
    let groups = groups(&service, &job);
    assert_eq!(
        (groups[0].workers.len(), &groups[1].workers),
        (2, &vec![workers[0].name.clone()]),
        "{groups:?}"
    );
    assert_eq!(groups[1].checkpoint_step, None, "it continues from the state of the other worker");
}

#[test]
fn a_worker_joins_a_running_job() {
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(1, 2);
    let service = TestService::start();
    let _w0 = service.worker("w0");
    let job = service.submit(&fixture);
    service.until_state(&job, "running");
    let _w1 = service.worker("w1");
    expect_reference_outcome(&service, &job, &fixture.path("out"));
    let groups = groups(&service, &job);
    assert_eq!(groups.len(), 2, "{groups:?}");
    assert_eq!((groups[1].workers.len(), groups[1].reason.as_str()), (2, "w1 can join"));
    assert_eq!(lost(&service, &job), Vec::<String>::new());
}

#[test]
fn a_draining_worker_hands_its_job_over() {
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(1, 2);
    let service = TestService::start();
    let mut workers = pair(&service);
    let job = service.submit(&fixture);
    let first = service.until_step(&job, 5).workers[0].clone();
    take(&mut workers, &first).daemon.terminate().expect_code(0);
    let running = service.api().job(&job).unwrap();
    assert_ne!(running.state, "succeeded", "the worker was terminated too late");
    expect_reference_outcome(&service, &job, &fixture.path("out"));
    let groups = groups(&service, &job);
    assert_eq!((groups.len(), &groups[1].workers), (2, &vec![workers[0].name.clone()]), "{groups:?}");
    assert_eq!(groups[1].reason, format!("worker {first} leaves"));
    assert_eq!(lost(&service, &job), Vec::<String>::new());
}

#[test]
fn a_hanging_worker_is_evicted_and_releases_the_job_later() {
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(1, 2);
    let service = TestService::start();
    let mut workers = pair(&service);
    let job = service.submit(&fixture);
    let first = service.until_step(&job, 5).workers[0].clone();
    let hung = take(&mut workers, &first);
    hung.daemon.signal(Signal::STOP);
    expect_reference_outcome(&service, &job, &fixture.path("out"));
    assert_eq!(lost(&service, &job), std::slice::from_ref(&first));
    hung.daemon.signal(Signal::CONT);
    let worker = service.until_worker(&first, "idle");
    assert_eq!(worker.job_id, None);
}

#[test]
fn a_worker_that_cannot_read_the_base_is_left_out() {
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(1, 2);
    let service = TestService::start();
    let root = fixture.path("").canonicalize().unwrap();
    let _w0 = service.worker_with("w0", &[("model_roots", root.to_str().unwrap())]);
    let path = fixture.job();
    let submit = ["submit", path.to_str().unwrap(), "--max-upload", "0", "-o", "json"];
    let job = service.run(&submit).expect_code(0).json()["job_id"].as_str().unwrap().to_owned();
    service.until_step(&job, 5);
    // It joins, and has no model_roots.
    let _w1 = service.worker("w1");
    expect_reference_outcome(&service, &job, &fixture.path("out"));
    assert_eq!(lost(&service, &job), ["w1"]);
    let groups = groups(&service, &job);
    assert_eq!(groups.last().unwrap().workers, ["w0"], "{groups:?}");
    let logs = service.run(&["logs", &job]).expect_code(0).stdout;
    assert!(logs.contains("lost w1 (rank 1): model.base: "), "{logs}");
}

/// Two workers that are both idle, so that a job gets both at once.
fn pair(service: &TestService) -> Vec<Worker> {
    let workers = ["w0", "w1"].map(|name| service.worker(name));
    for worker in &workers {
        service.until_worker(&worker.name, "idle");
    }
    workers.into()
}

fn take(workers: &mut Vec<Worker>, name: &str) -> Worker {
    let index = workers.iter().position(|worker| worker.name == name).unwrap();
    workers.swap_remove(index)
}
