//! The daemons themselves: settings, health, metrics.

use std::process::Command;

use lora_e2e::http::HttpResponse;
use lora_e2e::{
    Daemon, Finished, Fixture, TestService, lora_coordinator, lora_worker, repository, sets, until,
    without_settings,
};

#[test]
fn health_and_metrics_reflect_the_state() {
    let fixture = Fixture::with_steps(2);
    let mut service = TestService::start();
    let ok = HttpResponse { status: 200, body: "ok\n".into() };
    for path in ["/healthz", "/readyz"] {
        assert_eq!(
            until(path, || Some(service.daemon().get(path)).filter(|answer| answer.status == 200)),
            ok
        );
    }
    assert_eq!(service.daemon().get("/nothing").status, 404);
    let metric = |service: &TestService, name: &str| service.daemon().metric(name);
    assert_eq!(metric(&service, "lora_workers"), Some(0.0));

    let worker = service.worker("w0");
    service.until_worker("w0", "idle");
    assert_eq!(
        until("readiness", || Some(worker.daemon.get("/readyz")).filter(|answer| answer.status == 200)),
        ok
    );
    assert_eq!(worker.daemon.get("/healthz"), ok);
    until("the worker's count", || (metric(&service, "lora_workers") == Some(1.0)).then_some(()));
    assert_eq!(metric(&service, "lora_workers_free"), Some(1.0));
    assert_eq!(worker.daemon.metric("lora_worker_connected"), Some(1.0));

    let job = service.submit(&fixture);
    service.result(&job, &fixture.path("out"));
    assert_eq!(worker.steps(), 2);
    assert!(worker.daemon.metric("lora_worker_tokens_total") > Some(0.0));
    until("the steps", || (metric(&service, "lora_steps_total") == Some(2.0)).then_some(()));
    until("an idle worker", || worker.daemon.metric("lora_worker_phase{phase=\"idle\"}"));
    assert_eq!(metric(&service, "lora_jobs{state=\"running\"}"), Some(0.0));

    service.terminate().expect_code(0);
    let answer =
        until("unreadiness", || Some(worker.daemon.get("/readyz")).filter(|answer| answer.status != 200));
    assert_eq!((answer.status, worker.daemon.get("/healthz").status), (503, 200), "{answer:?}");
    assert_eq!(worker.daemon.metric("lora_worker_connected"), Some(0.0));
}

#[test]
fn the_documented_configurations_start_both_daemons() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let mut command = with_file(lora_coordinator(), "coordinator.toml");
    sets(&mut command, [("state_dir", path("state").as_str()), ("grpc.listen", "127.0.0.1:0")]);
    sets(&mut command, [("http.listen", "127.0.0.1:0"), ("log.format", "json")]);
    let coordinator = Daemon::start(&mut command);
    let mut command = with_file(lora_worker(), "worker.toml");
    let url = format!("http://{}", coordinator.address("address"));
    sets(&mut command, [("coordinator", url.as_str()), ("cache_dir", &path("cache"))]);
    sets(&mut command, [("peer.listen", "127.0.0.1:0"), ("http.listen", "127.0.0.1:0")]);
    // The environment takes precedence over the file.
    let worker = Daemon::start(command.env("LORA__LOG__FORMAT", "json").env("LORA__NAME", "w7"));
    let api = lora_e2e::ApiClient::new(&url);
    let workers = until("the worker", || api.workers().filter(|workers| !workers.is_empty()));
    assert_eq!(workers[0].name, "w7");
    for daemon in [&worker, &coordinator] {
        until("readiness", || (daemon.get("/readyz").status == 200).then_some(()));
    }
    worker.terminate().expect_code(0);
    coordinator.terminate().expect_code(0);
}

#[test]
fn an_invalid_setting_is_rejected_with_a_suggestion() {
    for (program, set, expected) in [
        (lora_coordinator as fn() -> Command, "workers.lease_second=3", "workers.lease_seconds"),
        (lora_coordinator, "grpc.listen=here", "0.0.0.0:7400"),
        (lora_worker, "peers.listen=127.0.0.1:0", "peer.listen"),
        (lora_worker, "threads=many", "whole number"),
        (lora_worker, "coordinator=here", "http://coordinator:7400"),
    ] {
        let refused = Finished::run(without_settings(&mut program()).args(["--set", set])).expect_code(2);
        assert!(refused.error().unwrap_or_default().contains(expected), "{set}: {}", refused.stderr);
    }
    for program in [lora_coordinator, lora_worker] {
        let help = Finished::run(program().arg("--help")).expect_code(0).stdout;
        assert!(help.contains("Example"), "{help}");
    }
}

#[test]
fn state_directories_and_worker_names_are_exclusive() {
    let service = TestService::start();
    let _worker = service.worker("w0");
    service.until_worker("w0", "idle");
    let second = service.worker("w0");
    until("a refusal", || {
        let reasons =
            second.daemon.log().into_iter().filter_map(|fields| Some(fields["reason"].as_str()?.to_owned()));
        reasons.into_iter().find(|reason| reason.contains("another process with this name"))
    });
    assert_eq!(service.api().workers().unwrap().len(), 1);

    let mut command = lora_coordinator();
    sets(
        &mut command,
        [("state_dir", service.state_dir().to_str().unwrap()), ("grpc.listen", "127.0.0.1:0")],
    );
    sets(&mut command, [("http.listen", "")]);
    let refused = Finished::run(without_settings(&mut command)).expect_code(1);
    assert!(refused.stderr.contains("in use by another coordinator"), "{}", refused.stderr);
}

fn with_file(mut command: Command, name: &str) -> Command {
    without_settings(&mut command).arg("--config").arg(repository().join("configs").join(name));
    command
}
