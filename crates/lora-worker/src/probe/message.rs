//! The messages from a rank of an all-reduce to the process that started it.

use std::io::{self, Write};

use lora_train::AllReduceMeasurement;
use serde::{Deserialize, Serialize};

/// A message, as a line of JSON on the stdout of a rank. All other lines are logs: NCCL logs to
/// stdout.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RankMessage {
    /// The address on which the rank listens for its peers.
    Address(String),
    /// The measurement, at the end.
    Reading(AllReduceMeasurement),
}

impl RankMessage {
    /// Parses a line. Returns `None` for a line of a log.
    pub(super) fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }

    /// Writes the message to stdout.
    pub(super) fn send(&self) -> io::Result<()> {
        let text = serde_json::to_string(self)?;
        let mut out = io::stdout().lock();
        // NCCL writes its log in blocks that end in the middle of a line. A single write to a pipe
        // is not interleaved with other writes, so the message gets its own line.
        out.write_all(format!("\n{text}\n").as_bytes())?;
        out.flush()
    }
}
