//! What a rank of an all-reduce tells the process that started it.

use std::io::{self, Write};

use lora_train::AllReduceMeasurement;
use serde::{Deserialize, Serialize};

/// A line of JSON on the stdout of a rank. All other lines there are logs: NCCL's go to stdout.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// Where the rank listens for its peers.
    Address(String),
    /// Its reading, at the end.
    Reading(AllReduceMeasurement),
}

impl Message {
    /// The message of a line; `None` for a line of a log.
    pub(super) fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }

    /// Writes the message to stdout.
    pub(super) fn send(&self) -> io::Result<()> {
        let text = serde_json::to_string(self)?;
        let mut out = io::stdout().lock();
        // NCCL's log is written in blocks, which end in the middle of a line. One write to a pipe is
        // not torn apart, so the message has a line of its own.
        out.write_all(format!("\n{text}\n").as_bytes())?;
        out.flush()
    }
}
