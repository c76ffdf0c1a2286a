//! Settings with which a worker would need less memory.

use std::fmt;

use lora_spec::{JobSpec, format_bytes};
use serde::{Deserialize, Serialize};

/// Settings with which a worker would need less memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Alternative {
    /// Keys and values of the settings that change.
    pub(crate) settings: Vec<(String, String)>,
    /// Peak with these settings, in bytes.
    pub(crate) peak: u64,
}

impl Alternative {
    /// Creates the alternative to `job` with the settings of `changed`, which needs `peak` bytes.
    pub(crate) fn new(job: &JobSpec, changed: &JobSpec, peak: u64) -> Self {
        Self { settings: differences(job, changed), peak }
    }
}

impl fmt::Display for Alternative {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settings: Vec<String> =
            self.settings.iter().map(|(key, value)| format!("{key}: {value}")).collect();
        write!(f, "{} ({})", settings.join(" and "), format_bytes(self.peak))
    }
}

/// Returns keys and values of the settings of `changed` that differ from `job`.
fn differences(job: &JobSpec, changed: &JobSpec) -> Vec<(String, String)> {
    let json = |job: &JobSpec| serde_json::to_value(job).unwrap_or_default();
    let (before, after) = (json(job), json(changed));
    ["model.quantization", "training.activation_checkpointing", "training.micro_batch_size"]
        .into_iter()
        .filter_map(|key| {
            let pointer = format!("/{}", key.replace('.', "/"));
            let (before, after) = (before.pointer(&pointer)?, after.pointer(&pointer)?);
            let text = after.as_str().map_or_else(|| after.to_string(), str::to_owned);
            (before != after).then(|| (key.to_owned(), text))
        })
        .collect()
}
