//! The coordinator's settings, with their defaults. `configs/coordinator.toml` shows them all.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use lora_daemon::http::HttpConfig;
use lora_daemon::log::LogConfig;
use lora_spec::FieldError;
use serde::{Deserialize, Serialize};

/// The upper limit of the time between heartbeats; workers send one at least this often.
const MAX_HEARTBEAT_SECONDS: f64 = 60.0;
/// The upper limit of the other settings in seconds: a year.
const MAX_SECONDS: f64 = 365.0 * 24.0 * 3600.0;

/// Settings of a coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory of the database and the files; created if it is missing. Only one coordinator at a
    /// time can use it.
    pub state_dir: PathBuf,
    /// Whether a start adopts files that belong to another database or to a newer copy of this one,
    /// and continues if all files that the database lists are missing. If false, such a start
    /// fails.
    pub adopt_objects: bool,
    /// The address for clients and workers.
    pub grpc: GrpcConfig,
    /// The address of the HTTP endpoints for health and metrics.
    pub http: HttpConfig,
    /// The filter and the format of the log.
    pub log: LogConfig,
    /// Limits of uploads and of what is kept.
    pub limits: LimitsConfig,
    /// The heartbeats and leases of workers.
    pub workers: WorkersConfig,
    /// The time limits of groups, and the number of broken groups after which a job fails.
    pub recovery: RecoveryConfig,
}

/// The address for clients and workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GrpcConfig {
    /// IP address and port; port 0 takes a free port.
    pub listen: String,
}

/// Limits of uploads and of what is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Bytes of the largest file that may be uploaded.
    pub upload_bytes: u64,
    /// Hours until a file that no job names is removed.
    pub unreferenced_hours: f64,
    /// Hours until a stored file without a row in the database is removed, counted from when it is
    /// first found.
    pub unknown_object_hours: f64,
    /// Number of newest lifecycle events to keep for each job.
    pub retained_events: u64,
    /// Number of newest steps to keep for each job.
    pub retained_steps: u64,
}

/// The heartbeats and leases of workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkersConfig {
    /// Seconds between two heartbeats of a worker.
    pub heartbeat_seconds: f64,
    /// Seconds without a heartbeat after which a worker is lost; more than twice
    /// `heartbeat_seconds`.
    pub lease_seconds: f64,
}

/// The time limits of groups, and the number of broken groups after which a job fails.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecoveryConfig {
    /// Seconds for which reports about a broken group are collected before a new group is formed.
    pub settle_seconds: f64,
    /// Number of groups in a row that break without a finished step until their job fails.
    pub fruitless_generations: u32,
    /// Seconds that a worker may take to fetch and load base and data.
    pub preparing_seconds: f64,
    /// Seconds that the workers of a job may take to connect with each other.
    pub forming_seconds: f64,
    /// Seconds that a step may take, including its evaluation.
    pub step_seconds: f64,
    /// Seconds that a worker may take to upload its state.
    pub saving_seconds: f64,
    /// Seconds that a worker may take to verify and upload the result.
    pub exporting_seconds: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/loractl/coordinator".into(),
            adopt_objects: false,
            grpc: GrpcConfig::default(),
            http: HttpConfig { listen: "0.0.0.0:7401".into() },
            log: LogConfig::default(),
            limits: LimitsConfig::default(),
            workers: WorkersConfig::default(),
            recovery: RecoveryConfig::default(),
        }
    }
}

impl Default for GrpcConfig {
    fn default() -> Self {
        Self { listen: "0.0.0.0:7400".into() }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            upload_bytes: 2 << 30,
            unreferenced_hours: 24.0,
            unknown_object_hours: 168.0,
            retained_events: 10_000,
            retained_steps: 1_000_000,
        }
    }
}

impl Default for WorkersConfig {
    fn default() -> Self {
        Self { heartbeat_seconds: 2.0, lease_seconds: 15.0 }
    }
}

impl Default for RecoveryConfig {
    fn default() -> Self {
        Self {
            settle_seconds: 2.0,
            fruitless_generations: 5,
            preparing_seconds: 3600.0,
            forming_seconds: 120.0,
            step_seconds: 1800.0,
            saving_seconds: 600.0,
            exporting_seconds: 1800.0,
        }
    }
}

impl Config {
    /// Checks the values.
    ///
    /// # Errors
    /// The first invalid setting, with the reason and a valid value.
    pub fn check(&self) -> Result<(), FieldError> {
        let fail = |field: &str, message: String| Err(FieldError::new(field, message));
        if self.state_dir.as_os_str().is_empty() {
            return fail("state_dir", "is empty; it must be a directory".into());
        }
        let listen = &self.grpc.listen;
        if listen.parse::<SocketAddr>().is_err() {
            let right = "it must be an IP address with a port, such as 0.0.0.0:7400";
            return fail("grpc.listen", format!("is {listen:?}; {right}"));
        }
        self.http.address()?;
        self.log.check()?;
        let (limits, recovery) = (&self.limits, &self.recovery);
        for (field, count) in [
            ("limits.upload_bytes", limits.upload_bytes),
            ("limits.retained_events", limits.retained_events),
            ("limits.retained_steps", limits.retained_steps),
            ("recovery.fruitless_generations", recovery.fruitless_generations.into()),
        ] {
            if count == 0 {
                return fail(field, "is 0; it must be at least 1".into());
            }
        }
        for (field, value, longest) in [
            ("limits.unreferenced_hours", limits.unreferenced_hours, MAX_SECONDS / 3600.0),
            ("limits.unknown_object_hours", limits.unknown_object_hours, MAX_SECONDS / 3600.0),
            ("workers.heartbeat_seconds", self.workers.heartbeat_seconds, MAX_HEARTBEAT_SECONDS),
            ("workers.lease_seconds", self.workers.lease_seconds, MAX_SECONDS),
            ("recovery.settle_seconds", recovery.settle_seconds, MAX_SECONDS),
            ("recovery.preparing_seconds", recovery.preparing_seconds, MAX_SECONDS),
            ("recovery.forming_seconds", recovery.forming_seconds, MAX_SECONDS),
            ("recovery.step_seconds", recovery.step_seconds, MAX_SECONDS),
            ("recovery.saving_seconds", recovery.saving_seconds, MAX_SECONDS),
            ("recovery.exporting_seconds", recovery.exporting_seconds, MAX_SECONDS),
        ] {
            if !(value > 0.0 && value <= longest) {
                return fail(field, format!("is {value}; it must be above 0 and at most {longest}"));
            }
        }
        let WorkersConfig { heartbeat_seconds, lease_seconds } = self.workers;
        if lease_seconds <= 2.0 * heartbeat_seconds {
            let right = "it must be more than twice workers.heartbeat_seconds";
            return fail(
                "workers.lease_seconds",
                format!("is {lease_seconds}; {right}, {heartbeat_seconds}"),
            );
        }
        Ok(())
    }
}

impl LimitsConfig {
    /// Time until a file that no job names is removed.
    pub fn unreferenced(&self) -> Duration {
        seconds(self.unreferenced_hours * 3600.0)
    }

    /// Time until a stored file without a row in the database is removed.
    pub fn unknown_objects(&self) -> Duration {
        seconds(self.unknown_object_hours * 3600.0)
    }
}

impl WorkersConfig {
    /// Time without a heartbeat after which a worker is lost.
    pub fn lease(&self) -> Duration {
        seconds(self.lease_seconds)
    }
}

impl RecoveryConfig {
    /// Time for which the reports about a broken group are collected.
    pub fn settle(&self) -> Duration {
        seconds(self.settle_seconds)
    }
}

/// Converts checked settings, which always fit a [`Duration`].
fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests;
