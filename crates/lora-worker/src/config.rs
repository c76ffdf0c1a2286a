//! The worker's settings, with their defaults. `configs/worker.toml` shows them all.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use lora_collective::backend_choice::Collective;
use lora_daemon::http::HttpConfig;
use lora_daemon::log::LogConfig;
use lora_spec::{DeviceSpec, FieldError};
use serde::{Deserialize, Serialize};
use tonic::transport::Uri;

/// The longest time of a setting: a year, in seconds.
const MAX_SECONDS: f64 = 365.0 * 24.0 * 3600.0;
/// The longest name, in bytes.
const MAX_NAME_BYTES: usize = 128;

/// Settings of a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The worker's name in messages, unique among workers. Empty: the name of the host.
    pub name: String,
    /// Address of the coordinator's gRPC service: `http://host:port`.
    pub coordinator: String,
    /// Directory of the files that are fetched for jobs. Created if it does not exist.
    pub cache_dir: PathBuf,
    /// The device to compute on.
    pub device: DeviceSpec,
    /// The transport of gradients between workers on GPUs.
    pub collective: Collective,
    /// Number of threads for computing. 0: the number of processors.
    pub threads: usize,
    /// Bytes of the GPU's or the machine's memory that a job may use. 0: the GPU's memory that is
    /// free at the start, or all of the machine's memory.
    pub memory: u64,
    /// Directories under which a job may name a base by its path.
    pub model_roots: Vec<PathBuf>,
    /// Seconds without a coordinator after which training stops. The worker keeps the state.
    pub orphan_timeout_seconds: f64,
    /// Seconds that a worker waits for its release by the coordinator after it was asked to end.
    pub drain_timeout_seconds: f64,
    /// Connections with other workers.
    pub peer: PeerConfig,
    /// Health and metrics.
    pub http: HttpConfig,
    /// Logs.
    pub log: LogConfig,
    /// The cache of files that are fetched for jobs.
    pub cache: CacheConfig,
}

/// Connections with other workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PeerConfig {
    /// IP address and port to listen on. Port 0 takes a free one.
    pub listen: String,
    /// `host:port` at which other workers reach this one. Empty: the address from which this host
    /// reaches the coordinator, with the port listened on.
    pub advertise_address: String,
}

/// The cache of files that are fetched for jobs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Bytes that are kept. The least recently used files are removed first.
    pub max_bytes: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: String::new(),
            coordinator: "http://127.0.0.1:7400".into(),
            cache_dir: "/var/cache/loractl".into(),
            device: DeviceSpec::Auto,
            collective: Collective::Auto,
            threads: 0,
            memory: 0,
            model_roots: Vec::new(),
            orphan_timeout_seconds: 1800.0,
            drain_timeout_seconds: 120.0,
            peer: PeerConfig::default(),
            http: HttpConfig { listen: "0.0.0.0:7411".into() },
            log: LogConfig::default(),
            cache: CacheConfig::default(),
        }
    }
}

impl Default for PeerConfig {
    fn default() -> Self {
        Self { listen: "0.0.0.0:7410".into(), advertise_address: String::new() }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { max_bytes: 100 << 30 }
    }
}

impl Config {
    /// Checks the values.
    ///
    /// # Errors
    /// The first invalid setting, and what would be right.
    pub fn check(&self) -> Result<(), FieldError> {
        let fail = |field: &str, message: String| Err(FieldError::new(field, message));
        let wrong = |field: &str, value: &str, right: &str| fail(field, format!("is {value:?}; {right}"));
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.name.len() > MAX_NAME_BYTES || !self.name.chars().all(is_plain) {
            let right = "it must be at most 128 letters, digits, `-`, `_` and `.`";
            return wrong("name", &self.name, right);
        }
        if !is_http(&self.coordinator) {
            let right = "it must be an http URL with a host, such as http://coordinator:7400";
            return wrong("coordinator", &self.coordinator, right);
        }
        if self.cache_dir.as_os_str().is_empty() {
            return fail("cache_dir", "is empty; it must be a directory".into());
        }
        if let Some(root) = self.model_roots.iter().find(|root| !root.is_absolute()) {
            return fail("model_roots", format!("has {root:?}; it must be an absolute path"));
        }
        for (field, value) in [
            ("orphan_timeout_seconds", self.orphan_timeout_seconds),
            ("drain_timeout_seconds", self.drain_timeout_seconds),
        ] {
            if !(value > 0.0 && value <= MAX_SECONDS) {
                return fail(field, format!("is {value}; it must be above 0 and at most {MAX_SECONDS}"));
            }
        }
        let PeerConfig { listen, advertise_address } = &self.peer;
        if listen.parse::<SocketAddr>().is_err() {
            let right = "it must be an IP address with a port, such as 0.0.0.0:7410";
            return wrong("peer.listen", listen, right);
        }
        if !advertise_address.is_empty() && !is_host_and_port(advertise_address) {
            let right = "it must be a host with a port, such as worker-1:7410, or empty";
            return wrong("peer.advertise_address", advertise_address, right);
        }
        self.http.address()?;
        self.log.check()?;
        if self.cache.max_bytes == 0 {
            return fail("cache.max_bytes", "is 0; it must be at least 1".into());
        }
        Ok(())
    }

    /// The worker's name in messages.
    pub fn worker_name(&self) -> String {
        if self.name.is_empty() {
            rustix::system::uname().nodename().to_string_lossy().into_owned()
        } else {
            self.name.clone()
        }
    }

    /// The time without a coordinator after which training stops.
    pub fn orphan_timeout(&self) -> Duration {
        seconds(self.orphan_timeout_seconds)
    }

    /// The time that a worker waits for its release by the coordinator after it was asked to end.
    pub fn drain_timeout(&self) -> Duration {
        seconds(self.drain_timeout_seconds)
    }
}

fn is_http(url: &str) -> bool {
    let uri = url.parse::<Uri>();
    uri.is_ok_and(|uri| uri.scheme_str() == Some("http") && uri.host().is_some_and(|host| !host.is_empty()))
}

fn is_host_and_port(address: &str) -> bool {
    let parts = address.rsplit_once(':');
    parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// Converts seconds to a duration. For checked settings the conversion always succeeds.
fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests;
