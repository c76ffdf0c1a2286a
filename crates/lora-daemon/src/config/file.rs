//! The settings in a TOML file, with their lines.

use std::path::Path;

use serde::Deserialize;
use toml::Value;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::ConfigError;

/// A setting in a file.
pub(super) struct Entry {
    /// `section.key`.
    pub(super) key: String,
    /// Line of the key, from 1.
    pub(super) line: usize,
    pub(super) value: Value,
}

/// Reads the settings of the file at `path`, in the order of their lines. A section without
/// settings is an entry too.
///
/// # Errors
/// The file cannot be read or is not TOML.
pub(super) fn read(path: &Path) -> Result<Vec<Entry>, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Io { path: path.to_owned(), source })?;
    let mut entries = Vec::new();
    let collected = DeTable::parse(&text)
        .and_then(|table| collect(table.into_inner(), "", &|at| line(&text, at), &mut entries));
    collected.map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: error.span().map_or(1, |span| line(&text, span.start)),
        message: error.message().replace('\n', ", "),
    })?;
    entries.sort_by_key(|entry| entry.line);
    Ok(entries)
}

/// Appends the settings of `table` to `entries`, with keys that start with `prefix`.
fn collect(
    table: DeTable<'_>,
    prefix: &str,
    line: &impl Fn(usize) -> usize,
    entries: &mut Vec<Entry>,
) -> Result<(), toml::de::Error> {
    for (name, value) in table {
        let key = format!("{prefix}{}", name.get_ref());
        match value.get_ref() {
            DeValue::Table(section) if !section.is_empty() => {
                if let DeValue::Table(section) = value.into_inner() {
                    collect(section, &format!("{key}."), line, entries)?;
                }
            }
            _ => {
                let line = line(name.span().start);
                let value = Value::deserialize(ValueDeserializer::from(value))?;
                entries.push(Entry { key, line, value });
            }
        }
    }
    Ok(())
}

/// Returns the line, from 1, of the byte offset `at`.
fn line(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
}
