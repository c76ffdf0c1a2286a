//! A job over workers on different hosts: Linux network namespaces that reach each other over a router, where the coordinator
//! is.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::io::Write;
use std::path::Path;
use std::process::Command;

use lora_e2e::{
    Daemon, Finished, Fixture, Outcome, lora_coordinator, lora_worker, loractl, sets, until, without_settings,
};

/// Of the coordinator, on the way to the first worker's host; and of that host.
const COORDINATOR: &str = "10.99.1.1";
const FIRST: &str = "10.99.1.2";
/// On the way to the second worker's host; and of that.
const ROUTER: &str = "10.99.2.1";
const SECOND: &str = "10.99.2.2";

#[test]
fn workers_on_different_hosts_give_the_same_bits() {
    let network = match Network::new() {
        Ok(network) => network,
        Err(why) => {
            // Not by eprintln: the test harness would keep that to itself.
            writeln!(std::io::stderr(), "SKIPPED: no network namespaces on this machine: {why}").unwrap();
            return;
        }
    };
    let fixture = Fixture::of_short_steps();
    fixture.ask_for_workers(2, 2);
    let expected = fixture.finish("expected", &["--workers", "2"]);
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);

    let mut command = lora_coordinator();
    sets(&mut command, [("state_dir", text(&place("state"))), ("log.format", "json")]);
    let coordinator = Daemon::start(&mut network.at(&network.router, command));
    // Nothing is set but what must be: the ports are the defaults, and the addresses of peers are found.
    let url = format!("http://{COORDINATOR}:7400");
    let workers =
        [(&network.first, "first", &url), (&network.second, "second", &url)].map(|(host, name, url)| {
            let mut command = lora_worker();
            sets(&mut command, [("name", name), ("coordinator", url), ("cache_dir", text(&place(name)))]);
            sets(&mut command, [("threads", "1"), ("log.format", "json")]);
            Daemon::start(&mut network.at(host, command))
        });
    let ask = |arguments: &[&str]| {
        let mut command = loractl();
        command.args(arguments).args(["--coordinator", &url]);
        Finished::of(&mut network.at(&network.first, command)).expect_code(0)
    };
    let seen = until("both workers", || {
        let seen = ask(&["workers", "-o", "json"]).json();
        (seen.as_array().unwrap().len() == 2).then_some(seen)
    });
    let addresses = [0, 1].map(|worker: usize| seen[worker]["peer_address"].as_str().unwrap().to_owned());
    assert_eq!(addresses, [format!("{FIRST}:7410"), format!("{SECOND}:7410")]);

    ask(&["submit", text(&fixture.job()), "--watch"]);
    let job = ask(&["list", "-o", "json"]).json()[0]["job_id"].as_str().unwrap().to_owned();
    ask(&["download", &job, "--out", text(&place("out"))]);
    assert_eq!(Outcome::read(&place("out")), expected);
    workers.into_iter().for_each(|worker| drop(worker.terminate().expect_code(0)));
    coordinator.terminate().expect_code(0);
}

/// Three namespaces: two hosts, and a router between them. Removed, with all their devices, when this is dropped.
struct Network {
    router: String,
    first: String,
    second: String,
}

impl Network {
    /// # Errors
    /// What the machine lacks, or does not allow.
    fn new() -> Result<Self, String> {
        let name = |host: &str| format!("lora-{}-{host}", std::process::id());
        let network = Self { router: name("router"), first: name("first"), second: name("second") };
        let Self { router, first, second } = &network;
        for namespace in [router, first, second] {
            ip(&["netns", "add", namespace])?;
            ip(&["-n", namespace, "link", "set", "dev", "lo", "up"])?;
        }
        for (host, device, here, there) in
            [(first, "to-first", COORDINATOR, FIRST), (second, "to-second", ROUTER, SECOND)]
        {
            ip(&[
                "-n", router, "link", "add", device, "type", "veth", "peer", "name", "uplink", "netns", host,
            ])?;
            // Where that is allowed, the rest works.
            for (namespace, device, address) in [(router, device, here), (host, "uplink", there)] {
                ip(&["-n", namespace, "address", "add", &format!("{address}/30"), "dev", device]).unwrap();
                ip(&["-n", namespace, "link", "set", "dev", device, "up"]).unwrap();
            }
            ip(&["-n", host, "route", "add", "default", "via", here]).unwrap();
        }
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        ip(&["netns", "exec", router, "sh", "-c", forward]).unwrap();
        Ok(network)
    }

    /// `command` in a namespace.
    fn at(&self, namespace: &str, mut command: Command) -> Command {
        without_settings(&mut command);
        let mut there = Command::new("ip");
        there.args(["netns", "exec", namespace]).arg(command.get_program()).args(command.get_args());
        without_settings(&mut there);
        there
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in [&self.router, &self.first, &self.second] {
            // One that was never made cannot be removed.
            let _ = ip(&["netns", "delete", namespace]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let done = Command::new("ip").args(arguments).output();
    let done = done.map_err(|error| format!("ip: {error}"))?;
    let said = || String::from_utf8_lossy(&done.stderr).trim().to_owned();
    if done.status.success() { Ok(()) } else { Err(format!("ip {}: {}", arguments.join(" "), said())) }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
