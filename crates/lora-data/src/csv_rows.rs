//! Reads comma-separated values (RFC 4180) with a header as JSON objects of strings.

use std::collections::BTreeSet;
use std::path::Path;

use csv::{ErrorKind, ReaderBuilder};
use serde_json::Value as Json;

use crate::DataError;
use crate::raw_rows::{RawRow, RawRows};

/// Returns the rows with the number of their first line (from 1). A row is an error if it has
/// another number of values than the header, or is not UTF-8.
///
/// # Errors
/// The header is invalid, or a quote is not closed.
pub(crate) fn read_rows<'a>(name: &'a Path, bytes: &'a [u8]) -> Result<RawRows<'a>, DataError> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let mut reader = ReaderBuilder::new().from_reader(bytes);
    let header = reader.headers().map_err(|error| invalid(name, &error))?.clone();
    let mut names = BTreeSet::new();
    if let Some(twice) = header.iter().find(|name| !names.insert(*name)) {
        return Err(DataError::file(name, format!("its header has the name {twice:?} twice")));
    }
    if let Some(line) = unclosed_quote(bytes) {
        return Err(DataError::Row {
            at: format!("{}:{line}", name.display()),
            message: "a quote that begins here is not closed".to_owned(),
        });
    }
    let lines = bytes.iter().filter(|&&byte| byte == b'\n').count();
    Ok(RawRows::new(
        Some(lines),
        reader.into_records().map(move |record| {
            let record = record.map_err(|error| invalid(name, &error))?;
            let line = record.position().map_or(0, |position| position.line() as usize);
            let pairs = header.iter().zip(&record).map(|(key, value)| (key.to_owned(), Json::from(value)));
            Ok((line, RawRow::Object(pairs.collect())))
        }),
    ))
}

/// The line (from 1) of a quote that is not closed. After a missing quote the next one, which
/// begins a value, seems to end one: it is not followed by a comma or the end of the line.
fn unclosed_quote(bytes: &[u8]) -> Option<usize> {
    if bytes.iter().filter(|&&byte| byte == b'"').count() % 2 == 0 {
        return None;
    }
    let (mut line, mut opened) = (1, None);
    for (at, byte) in bytes.iter().enumerate() {
        match (byte, opened) {
            (b'\n', _) => line += 1,
            (b'"', None) => opened = Some(line),
            (b'"', Some(from)) => match bytes.get(at + 1) {
                None | Some(b',' | b'\r' | b'\n' | b'"') => opened = None,
                Some(_) => return Some(from),
            },
            _ => {}
        }
    }
    opened.or(Some(line))
}

fn invalid(name: &Path, error: &csv::Error) -> DataError {
    let line = error.position().map_or(1, csv::Position::line);
    let message = match error.kind() {
        ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("has {len} values; the header has {expected_len} names")
        }
        ErrorKind::Utf8 { .. } => "is not UTF-8".to_owned(),
        _ => error.to_string(),
    };
    DataError::Row { at: format!("{}:{line}", name.display()), message }
}
