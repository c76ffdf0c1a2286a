//! Logs on stderr.

use std::io::{self, IsTerminal};

use lora_spec::FieldError;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// Settings of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// A level (`error`, `warn`, `info`, `debug`, `trace`, `off`), or levels by module, such as
    /// `info,lora_worker=debug`.
    pub filter: String,
    /// The format of a line.
    pub format: LogFormat,
}

/// The format of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text for people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info".into(), format: LogFormat::Text }
    }
}

impl LogConfig {
    /// Checks the settings of the section `log`.
    ///
    /// # Errors
    /// The filter is invalid.
    pub fn check(&self) -> Result<(), FieldError> {
        EnvFilter::builder().parse(&self.filter).map(drop).map_err(|error| {
            let message = format!(
                "is {:?}: {error}; it must be a level, such as info, or levels by module, such as \
                 info,lora_worker=debug",
                self.filter
            );
            FieldError::new("log.filter", message)
        })
    }
}

/// Starts logging. Only the first call in a process has an effect. If [`LogConfig::check`] rejects
/// the filter, only its valid parts apply.
pub fn init(config: &LogConfig) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::builder().parse_lossy(&config.filter))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    // An error means that logging has already started.
    let _ = match config.format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_filters_are_rejected() {
        let config = |filter: &str| LogConfig { filter: filter.into(), ..LogConfig::default() };
        for good in ["info", "off", "warn,lora_worker=trace"] {
            assert_eq!(config(good).check(), Ok(()));
        }
        let error = config("lora_worker=loud").check().unwrap_err().to_string();
        assert!(error.starts_with("log.filter: is \"lora_worker=loud\": "), "{error}");
        assert!(error.ends_with("such as info,lora_worker=debug"), "{error}");
    }
}
