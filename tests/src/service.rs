//! The networked service: a coordinator with workers and clients. Each is a process with its own
//! directories.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use lora_proto::v1;
use lora_spec::JobState;
use tempfile::TempDir;

use crate::api::ApiClient;
use crate::binary::{lora_coordinator, lora_worker, loractl};
use crate::daemon::Daemon;
use crate::fixture::Fixture;
use crate::output::RunOutcome;
use crate::process::{Finished, Running, until};

/// Times in seconds that detect a failure soon, but allow for the delays of a busy machine.
const TIMING_SETTINGS: [&str; 3] =
    ["workers.heartbeat_seconds=0.25", "workers.lease_seconds=3", "recovery.settle_seconds=0.5"];

/// A coordinator. Dropping this kills its process.
#[derive(Debug)]
pub struct TestService {
    // This field is dropped before the directory.
    daemon: Option<Daemon>,
    address: String,
    settings: Vec<String>,
    api: ApiClient,
    state: TempDir,
}

/// A worker of a coordinator. Dropping this kills its process.
#[derive(Debug)]
pub struct Worker {
    /// The process.
    pub daemon: Daemon,
    /// The name.
    pub name: String,
    cache: TempDir,
}

impl Worker {
    /// Returns the directory of its cache.
    pub fn cache_dir(&self) -> &Path {
        self.cache.path()
    }
}

impl TestService {
    /// Starts a coordinator.
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// Starts a coordinator with these settings in addition to those of the tests.
    pub fn with(settings: &[&str]) -> Self {
        let settings: Vec<String> =
            TIMING_SETTINGS.iter().chain(settings).map(|set| (*set).to_owned()).collect();
        let state = tempfile::tempdir().unwrap();
        let daemon = start(state.path(), &own_address(), &settings);
        let address = daemon.address("address").to_owned();
        let api = ApiClient::new(&format!("http://{address}"));
        Self { daemon: Some(daemon), address, settings, api, state }
    }

    /// Returns the running process.
    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    /// Returns `host:port` of the gRPC interface. A restart does not change the address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the state directory of the coordinator.
    pub fn state_dir(&self) -> &Path {
        self.state.path()
    }

    /// Returns a client of the gRPC interface.
    pub fn api(&self) -> &ApiClient {
        &self.api
    }

    /// Kills the coordinator.
    pub fn kill(&mut self) {
        self.daemon.take().unwrap().kill();
    }

    /// Sends SIGTERM to the coordinator and waits for its exit.
    pub fn terminate(&mut self) -> Finished {
        self.daemon.take().unwrap().terminate()
    }

    /// Starts the coordinator again with the same state directory and address.
    pub fn restart(&mut self) {
        self.daemon = Some(start(self.state.path(), &self.address, &self.settings));
    }

    /// Starts a worker with one thread.
    pub fn worker(&self, name: &str) -> Worker {
        self.worker_with(name, &[])
    }

    /// Starts a worker with one thread and additional settings.
    pub fn worker_with(&self, name: &str, settings: &[(&str, &str)]) -> Worker {
        let cache = tempfile::tempdir().unwrap();
        let mut command = lora_worker();
        sets(&mut command, [("name", name), ("coordinator", &format!("http://{}", self.address))]);
        sets(&mut command, [("cache_dir", cache.path().to_str().unwrap()), ("threads", "1")]);
        sets(&mut command, [("peer.listen", "127.0.0.1:0"), ("http.listen", "127.0.0.1:0")]);
        sets(&mut command, [("log.format", "json")]);
        sets(&mut command, settings.iter().copied());
        let daemon = Daemon::start(without_settings(&mut command));
        Worker { daemon, name: name.to_owned(), cache }
    }

    /// Returns a `loractl` command for this coordinator.
    pub fn loractl(&self, arguments: &[&str]) -> Command {
        let mut command = loractl();
        without_settings(&mut command).args(arguments).args(["--coordinator", &self.address]);
        command
    }

    /// Starts a `loractl` command for this coordinator.
    pub fn running(&self, arguments: &[&str]) -> Running {
        Running::start(&mut self.loractl(arguments))
    }

    /// Runs a `loractl` command for this coordinator and waits for its exit.
    pub fn run(&self, arguments: &[&str]) -> Finished {
        Finished::run(&mut self.loractl(arguments))
    }

    /// Submits the job of `fixture` and returns its id.
    pub fn submit(&self, fixture: &Fixture) -> String {
        let job = self.run(&["submit", fixture.job().to_str().unwrap(), "-o", "json"]).expect_code(0).json();
        job["job_id"].as_str().unwrap().to_owned()
    }

    /// Waits until `is_reached` is true for a job. The test fails if the job is in a state that it
    /// does not leave by itself and `is_reached` is false. `what` describes the condition.
    pub fn until(&self, job_id: &str, what: &str, is_reached: impl Fn(&v1::Job) -> bool) -> v1::Job {
        until(what, || {
            let job = self.api.job(job_id)?;
            if is_reached(&job) {
                return Some(job);
            }
            let is_stopped = JobState::from_name(&job.state).unwrap().is_stopped();
            assert!(!is_stopped, "waiting for {what}, but the job is {}, {:?}", job.state, job.failure);
            None
        })
    }

    /// Waits until a job is in `state`.
    pub fn until_state(&self, job_id: &str, state: &str) -> v1::Job {
        self.until(job_id, state, |job| job.state == state)
    }

    /// Waits until a job is running and the coordinator has stored `step` of its steps.
    pub fn until_step(&self, job_id: &str, step: u64) -> v1::Job {
        self.until(job_id, &format!("step {step}"), |job| {
            job.state == "running" && job.completed_steps >= step
        })
    }

    /// Waits until a worker is in `state`.
    pub fn until_worker(&self, name: &str, state: &str) -> v1::Worker {
        until(&format!("{name} to be {state}"), || {
            let workers = self.api.workers()?;
            workers.into_iter().find(|worker| worker.name == name && worker.state == state)
        })
    }

    /// Waits until a job has succeeded and downloads its result to `dir`.
    pub fn result(&self, job_id: &str, dir: &Path) -> RunOutcome {
        self.until_state(job_id, "succeeded");
        self.run(&["download", job_id, "--out", dir.to_str().unwrap()]).expect_code(0);
        RunOutcome::read(dir)
    }
}

impl Worker {
    /// Kills the worker.
    pub fn kill(self) {
        self.daemon.kill();
    }

    /// Returns the number of steps in which the worker took part.
    pub fn steps(&self) -> u64 {
        self.daemon.metric("lora_worker_steps_total").unwrap() as u64
    }
}

/// Adds `--set` for each setting to `command`.
pub fn sets<'a>(command: &mut Command, settings: impl IntoIterator<Item = (&'a str, &'a str)>) {
    for (key, value) in settings {
        command.args(["--set", &format!("{key}={value}")]);
    }
}

/// Removes the environment variables that configure daemons and clients of the person who runs the
/// tests.
pub fn without_settings(command: &mut Command) -> &mut Command {
    let ours = |name: &str| name.starts_with("LORA_") || name == "RUST_LOG";
    for (name, _) in std::env::vars_os().filter(|(name, _)| ours(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command
}

fn start(state: &Path, address: &str, settings: &[String]) -> Daemon {
    let mut command = lora_coordinator();
    sets(&mut command, [("state_dir", state.to_str().unwrap()), ("grpc.listen", address)]);
    sets(&mut command, [("http.listen", "127.0.0.1:0"), ("log.format", "json")]);
    sets(&mut command, settings.iter().filter_map(|set| set.split_once('=')));
    Daemon::start(without_settings(&mut command))
}

/// Returns a loopback address that no other process uses, with port 0. The port of the coordinator
/// therefore stays free while the coordinator is not running.
fn own_address() -> String {
    static SERVICES: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    format!("127.{}.{high}.{low}:0", SERVICES.fetch_add(1, Ordering::Relaxed))
}
