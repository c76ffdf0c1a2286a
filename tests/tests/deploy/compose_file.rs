//! Checks of `docker-compose.yml`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use lora_e2e::container::Volume;
use lora_e2e::{Finished, compose, loractl, repository};
use serde_json::Value;

use crate::containers::{expect_none, problems};

#[test]
fn compose_containers_match_the_programs() {
    let services = compose::services();
    assert_eq!(
        services.keys().collect::<Vec<_>>(),
        ["coordinator", "submit", "worker-0", "worker-1", "worker-gpu"]
    );
    let coordinators = ["coordinator:7400".to_owned()];
    expect_none(services.values().flat_map(|container| problems(container, &coordinators)));
}

#[test]
fn each_worker_has_its_own_name_and_cache() {
    let services = compose::services();
    let workers = || services.values().filter(|container| container.program() == "lora-worker");
    let names: BTreeSet<_> = workers().map(|container| &container.environment["LORA__NAME"]).collect();
    let caches: BTreeSet<_> = workers()
        .flat_map(|container| container.volumes.values())
        .filter_map(|volume| match volume {
            Volume::Persistent { name, .. } => Some(name),
            Volume::Scratch => None,
        })
        .collect();
    assert_eq!((workers().count(), names.len(), caches.len()), (3, 3, 3));
}

#[test]
fn the_gpu_worker_requests_the_gpu_only() {
    let services: Value = serde_saphyr::from_str(&text()).unwrap();
    let services = &services["services"];
    for (name, service) in services.as_object().unwrap() {
        let devices = &service["deploy"]["resources"]["reservations"]["devices"];
        let has_gpu = devices[0]["capabilities"][0] == "gpu";
        assert_eq!(has_gpu, service["build"]["target"] == "worker-cuda", "{name}");
        assert_eq!(has_gpu, service["profiles"][0] == "gpu", "{name}: only the profile gpu needs a GPU");
        assert_eq!(has_gpu, service["environment"]["LORA__DEVICE"] == "cuda:0", "{name}");
    }
}

#[test]
fn depends_on_targets_have_health_checks() {
    let services = compose::services();
    for container in services.values() {
        for other in &container.after {
            assert!(
                services[other].image.healthcheck().is_some(),
                "{} waits for {other}",
                container.location
            );
        }
    }
    assert_eq!(services["submit"].after, ["coordinator", "worker-0", "worker-1"]);
}

#[test]
fn a_container_runs_on_this_machine() {
    let services = compose::services();
    let addresses = BTreeMap::from([("coordinator:7400".to_owned(), "127.0.0.1:4321".to_owned())]);
    let command = services["worker-1"].on_this_machine(Command::new("worker"), Path::new("/dir"), &addresses);
    assert_eq!(command.get_args().collect::<Vec<_>>()[1], repository().join("configs/worker.toml"));
    let variables = command.get_envs().filter_map(|(name, value)| Some((name.to_str()?, value?.to_str()?)));
    let expected = [
        ("LORA__CACHE_DIR", "/dir/cache-1"),
        ("LORA__COORDINATOR", "http://127.0.0.1:4321"),
        ("LORA__HTTP__LISTEN", "127.0.0.1:0"),
        ("LORA__NAME", "worker-1"),
        ("LORA__PEER__LISTEN", "127.0.0.1:0"),
    ];
    assert_eq!(variables.collect::<BTreeMap<_, _>>(), BTreeMap::from(expected));
}

/// The command is valid and reads the job. It fails only because the coordinator at the address in
/// its variable cannot be reached.
#[test]
fn the_example_command_reaches_the_coordinator() {
    let unreachable = "127.0.0.1:1";
    let addresses = BTreeMap::from([("coordinator:7400".to_owned(), unreachable.to_owned())]);
    let submit = &compose::services()["submit"];
    let finished = Finished::run(&mut submit.on_this_machine(loractl(), Path::new("/nowhere"), &addresses))
        .expect_code(5);
    assert!(finished.stderr.contains(unreachable), "{}", finished.stderr);
}

#[test]
#[should_panic(expected = "the Dockerfile has no target wroker")]
fn a_missing_build_target_is_detected() {
    compose::parse(&text().replace("target: worker", "target: wroker"));
}

#[test]
#[should_panic(expected = "must be ./PATH:PATH:ro or NAME:PATH")]
fn a_writable_configuration_mount_is_detected() {
    compose::parse(&text().replace("/etc/loractl/worker.toml:ro", "/etc/loractl/worker.toml"));
}

fn text() -> String {
    std::fs::read_to_string(repository().join("docker-compose.yml")).unwrap()
}
