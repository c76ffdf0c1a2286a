//! A job on workers on different hosts: Linux network namespaces that are connected by a router, on
//! which the coordinator runs.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use lora_e2e::{
    Daemon, Finished, Fixture, RunOutcome, lora_coordinator, lora_worker, loractl, sets, until,
    without_settings,
};
use tempfile::TempDir;

const URL: &str = "http://10.99.1.1:7400";
/// The addresses between the router, which has the coordinator, and the first worker's host.
const COORDINATOR: &str = "10.99.1.1";
const FIRST: &str = "10.99.1.2";
/// The addresses between the router and the second worker's host.
const ROUTER: &str = "10.99.2.1";
const SECOND: &str = "10.99.2.2";

#[test]
fn workers_on_different_hosts_give_the_same_bits() {
    let Some(hosts) = Hosts::start() else { return };
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(2, 2);
    let expected = fixture.finish("expected", &["--workers", "2"]);
    let seen = hosts.ask(&["workers", "-o", "json"]).json();
    let addresses = [0, 1].map(|worker: usize| seen[worker]["peer_address"].as_str().unwrap().to_owned());
    assert_eq!(addresses, [format!("{FIRST}:7410"), format!("{SECOND}:7410")]);

    hosts.ask(&["submit", text(&fixture.job()), "--watch"]);
    assert_eq!(hosts.result(&fixture), expected);
    hosts.end();
}

#[test]
fn a_disconnected_host_is_evicted_and_rejoins() {
    let Some(hosts) = Hosts::start() else { return };
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(1, 2);
    let expected = fixture.finish("expected", &["--workers", "2"]);
    let id = hosts.ask(&["submit", text(&fixture.job()), "-o", "json"]).json()["job_id"].clone();
    let id = id.as_str().unwrap();
    until("some steps on both", || {
        let job = hosts.ask(&["list", "-o", "json"]).json()[0].take();
        let both = job["workers"].as_array().unwrap().len() == 2;
        (both && job["completed_steps"].as_u64() >= Some(5)).then_some(())
    });
    hosts.network.connect_second("down");
    hosts.ask(&["watch", id]);
    assert_eq!(hosts.result(&fixture), expected);
    let log = hosts.ask(&["logs", id]).stdout;
    assert!(log.contains("lost second (rank "), "{log}");
    hosts.network.connect_second("up");
    hosts.until_both_are_idle();
    hosts.end();
}

/// A coordinator on the router, and a connected worker on each host.
struct Hosts {
    // The order of the fields is the order of dropping: processes, then the network, then the
    // directories.
    coordinator: Daemon,
    workers: Vec<Daemon>,
    network: Network,
    dir: TempDir,
}

impl Hosts {
    /// Starts the hosts. Returns `None` and prints the reason to stderr if the machine does not
    /// allow it.
    fn start() -> Option<Self> {
        let network = match Network::new() {
            Ok(network) => network,
            Err(why) => {
                // The test harness captures the output of eprintln, so this writes to stderr
                // directly.
                let line = format!("SKIPPED: no network namespaces on this machine: {why}\n");
                std::io::stderr().write_all(line.as_bytes()).unwrap();
                return None;
            }
        };
        let dir = tempfile::tempdir().unwrap();
        let mut command = lora_coordinator();
        sets(&mut command, [("state_dir", text(&dir.path().join("state"))), ("log.format", "json")]);
        sets(&mut command, [("workers.heartbeat_seconds", "0.5"), ("workers.lease_seconds", "4")]);
        let coordinator = Daemon::start(&mut network.at(&network.router, command));
        // Only the required settings are set: the ports are the defaults, and the peer addresses
        // are derived.
        let workers = [("first", &network.first), ("second", &network.second)].map(|(name, host)| {
            let mut command = lora_worker();
            sets(
                &mut command,
                [("name", name), ("coordinator", URL), ("cache_dir", text(&dir.path().join(name)))],
            );
            sets(&mut command, [("threads", "1"), ("log.format", "json")]);
            Daemon::start(&mut network.at(host, command))
        });
        let hosts = Self { coordinator, workers: workers.into(), network, dir };
        hosts.until_both_are_idle();
        Some(hosts)
    }

    fn until_both_are_idle(&self) {
        until("two idle workers", || {
            let workers = self.ask(&["workers", "-o", "json"]).json();
            let idle = workers.as_array().unwrap().iter().filter(|worker| worker["state"] == "idle");
            (idle.count() == 2).then_some(())
        });
    }

    /// Runs a command of `loractl` on the first host, and expects it to succeed.
    fn ask(&self, arguments: &[&str]) -> Finished {
        let mut command = loractl();
        command.args(arguments).args(["--coordinator", URL]);
        Finished::run(&mut self.network.at(&self.network.first, command)).expect_code(0)
    }

    /// Downloads the result of the only job, which is the job of `fixture`.
    fn result(&self, fixture: &Fixture) -> RunOutcome {
        let job = self.ask(&["list", "-o", "json"]).json()[0]["job_id"].take();
        let out = fixture.path("out");
        self.ask(&["download", job.as_str().unwrap(), "--out", text(&out)]);
        RunOutcome::read(&out)
    }

    fn end(self) {
        for daemon in self.workers.into_iter().chain([self.coordinator]) {
            daemon.terminate().expect_code(0);
        }
        drop((self.network, self.dir));
    }
}

/// Three namespaces: two hosts, and a router between them. They and their devices are removed when
/// this is dropped.
struct Network {
    router: String,
    first: String,
    second: String,
}

impl Network {
    /// Creates the namespaces.
    ///
    /// # Errors
    /// The tool or the permission that the machine lacks.
    fn new() -> Result<Self, String> {
        static NETWORKS: AtomicUsize = AtomicUsize::new(0);
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let name = |host: &str| format!("lora-{}-{number}-{host}", std::process::id());
        let network = Self { router: name("router"), first: name("first"), second: name("second") };
        let Self { router, first, second } = &network;
        for namespace in [router, first, second] {
            ip(&["netns", "add", namespace])?;
            ip(&["-n", namespace, "link", "set", "dev", "lo", "up"])?;
        }
        for (host, device, router_address, host_address) in
            [(first, "to-first", COORDINATOR, FIRST), (second, "to-second", ROUTER, SECOND)]
        {
            ip(&[
                "-n", router, "link", "add", device, "type", "veth", "peer", "name", "uplink", "netns", host,
            ])?;
            // If the machine allows the commands above, those below succeed.
            for (namespace, device, address) in
                [(router, device, router_address), (host, "uplink", host_address)]
            {
                ip(&["-n", namespace, "address", "add", &format!("{address}/30"), "dev", device]).unwrap();
                ip(&["-n", namespace, "link", "set", "dev", device, "up"]).unwrap();
            }
            ip(&["-n", host, "route", "add", "default", "via", router_address]).unwrap();
        }
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        ip(&["netns", "exec", router, "sh", "-c", forward]).unwrap();
        Ok(network)
    }

    /// Disconnects the second host (`down`), or connects it again (`up`).
    fn connect_second(&self, state: &str) {
        ip(&["-n", &self.router, "link", "set", "dev", "to-second", state]).unwrap();
    }

    /// A command that runs `command` in a namespace.
    fn at(&self, namespace: &str, mut command: Command) -> Command {
        without_settings(&mut command);
        let mut in_namespace = Command::new("ip");
        in_namespace.args(["netns", "exec", namespace]).arg(command.get_program()).args(command.get_args());
        without_settings(&mut in_namespace);
        in_namespace
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in [&self.router, &self.first, &self.second] {
            // A namespace that was not created cannot be removed.
            let _ = ip(&["netns", "delete", namespace]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output();
    let output = output.map_err(|error| format!("ip: {error}"))?;
    let error = || String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(format!("ip {}: {}", arguments.join(" "), error())) }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
