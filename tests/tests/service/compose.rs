//! The processes of `docker-compose.yml` with their configuration.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;

use lora_e2e::container::Container;
use lora_e2e::{
    Daemon, Finished, Fixture, RunOutcome, compose, lora_coordinator, lora_worker, loractl, until,
};

use crate::{STEPS, reference_outcome};

/// The example's own job takes minutes without optimization. A job of [`STEPS`] short steps for
/// both workers replaces it.
#[test]
fn the_command_of_the_example_trains_a_job_on_both_workers() {
    let mut services = compose::services();
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(2, 2);
    let dir = tempfile::tempdir().unwrap();
    let examples = dir.path().join("examples");
    std::fs::create_dir(&examples).unwrap();
    symlink(fixture.path(""), examples.join("dates")).unwrap();
    services.get_mut("submit").unwrap().mounts.insert("/examples".into(), examples);

    let mut addresses = BTreeMap::new();
    let daemon = |container: &Container, program, addresses: &BTreeMap<String, String>| {
        let mut command = container.on_this_machine(program, dir.path(), addresses);
        // The test reads the addresses on which the daemons listen from the log.
        let daemon = Daemon::start(command.env("LORA__LOG__FORMAT", "json"));
        for (_, path) in &container.probes {
            until(path, || (daemon.get(path).status == 200).then_some(()));
        }
        daemon
    };
    let coordinator = daemon(&services["coordinator"], lora_coordinator(), &addresses);
    let address = coordinator.address("address").to_owned();
    addresses.insert("coordinator:7400".to_owned(), address.clone());
    let workers = ["worker-0", "worker-1"].map(|name| daemon(&services[name], lora_worker(), &addresses));
    let mut submit = services["submit"].on_this_machine(loractl(), dir.path(), &addresses);
    let done = Finished::run(&mut submit).expect_code(0);
    assert!(done.stdout.contains("succeeded"), "{}", done.stdout);

    // Another command replaces the command of the service.
    let mut list = services["submit"].clone();
    list.arguments = ["list", "-o", "json"].map(str::to_owned).into();
    let list =
        Finished::run(&mut list.on_this_machine(loractl(), dir.path(), &addresses)).expect_code(0).json();
    assert_eq!((&list[0]["state"], &list[0]["completed_steps"]), (&"succeeded".into(), &STEPS.into()));
    let job = list[0]["job_id"].as_str().unwrap();
    let out = fixture.path("out");
    let download = ["download", job, "--coordinator", &address, "--out", out.to_str().unwrap()];
    Finished::run(loractl().args(download)).expect_code(0);
    assert_eq!(RunOutcome::read(&out).adapter_sha256, reference_outcome().adapter_sha256);
    for worker in workers {
        assert_eq!(worker.metric("lora_worker_steps_total"), Some(STEPS as f64));
        worker.terminate().expect_code(0);
    }
    coordinator.terminate().expect_code(0);
}
