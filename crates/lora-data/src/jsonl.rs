//! JSON Lines: a JSON object on each line. Blank lines are allowed. A file that begins with `[` is
//! one JSON array of objects.

use std::path::Path;

use serde_json::value::RawValue;
use serde_json::{Map, Value as Json};

use crate::DataError;
use crate::message::json_type_name;

/// Returns the texts of the rows, with the numbers of their first lines (from 1).
///
/// # Errors
/// The file begins with `[` and is not a JSON array.
pub(crate) fn texts<'a>(name: &Path, bytes: &'a [u8]) -> Result<Vec<(usize, &'a [u8])>, DataError> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    if bytes.trim_ascii_start().starts_with(b"[") {
        return array(name, bytes);
    }
    let lines = bytes.split(|&byte| byte == b'\n').enumerate();
    Ok(lines.filter(|(_, line)| !line.trim_ascii().is_empty()).map(|(i, line)| (i + 1, line)).collect())
}

fn array<'a>(name: &Path, bytes: &'a [u8]) -> Result<Vec<(usize, &'a [u8])>, DataError> {
    let items: Vec<&RawValue> = serde_json::from_slice(bytes).map_err(|error| DataError::Row {
        at: format!("{}:{}:{}", name.display(), error.line(), error.column()),
        message: format!("invalid JSON: {}", reason(&error)),
    })?;
    let (mut line, mut at) = (1, 0);
    let rows = items.into_iter().map(|item| {
        let text = item.get().as_bytes();
        let start = text.as_ptr().addr() - bytes.as_ptr().addr();
        line += bytes[at..start].iter().filter(|&&byte| byte == b'\n').count();
        at = start;
        (line, text)
    });
    Ok(rows.collect())
}

/// Parses the object of a row.
///
/// # Errors
/// The text is not a JSON object. The error names file, line and column.
pub(crate) fn parse(name: &Path, number: usize, text: &[u8]) -> Result<Map<String, Json>, DataError> {
    match serde_json::from_slice(text) {
        Ok(Json::Object(row)) => Ok(row),
        Ok(other) => Err(DataError::Row {
            at: format!("{}:{number}", name.display()),
            message: format!("the row is {}; it must be a JSON object", json_type_name(&other)),
        }),
        Err(error) => Err(DataError::Row {
            // The position counts from the row's first line.
            at: format!("{}:{}:{}", name.display(), number + error.line().max(1) - 1, error.column()),
            message: format!("invalid JSON: {}", reason(&error)),
        }),
    }
}

/// The message of serde_json, which ends with a position.
fn reason(error: &serde_json::Error) -> String {
    error.to_string().split(" at line ").next().unwrap_or_default().to_owned()
}
