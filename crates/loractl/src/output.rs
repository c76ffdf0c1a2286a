//! Output of results on stdout.

mod event;
mod exported;
mod grid;
mod job;
mod table;
mod units;
mod worker;

use std::io::{self, Write};

use clap::ValueEnum;
use serde::Serialize;

pub(crate) use event::{EventView, Item, event_text};
pub(crate) use exported::ExportedView;
pub(crate) use job::{JobView, failure_text, job_grid, job_table};
pub(crate) use lora_spec::format_bytes as bytes;
pub(crate) use table::Table;
pub(crate) use units::{count, duration, format_time, parse_bytes};
pub(crate) use worker::{WorkerView, worker_grid};

/// Format of a result on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns.
    Table,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

impl Format {
    /// Writes `value` as JSON or YAML, or as the text that `table` returns.
    pub(crate) fn print<T: Serialize>(self, value: &T, table: impl FnOnce() -> String) -> anyhow::Result<()> {
        match self {
            Self::Table => line(&table())?,
            Self::Json => line(&serde_json::to_string_pretty(value)?)?,
            Self::Yaml => line(serde_saphyr::to_string(value)?.trim_end())?,
        }
        Ok(())
    }

    /// Writes one value of a sequence: as a line of JSON, as a YAML document, or as the text that
    /// `text` returns.
    pub(crate) fn print_next<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        match self {
            Self::Table => line(&text())?,
            Self::Json => line(&serde_json::to_string(value)?)?,
            Self::Yaml => line(&format!("---\n{}", serde_saphyr::to_string(value)?.trim_end()))?,
        }
        Ok(())
    }
}

/// Writes a line to stdout and flushes it.
///
/// # Errors
/// Stdout cannot be written, for example because its reader has exited.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}
