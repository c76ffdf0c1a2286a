//! JSON Lines: a JSON object on each line. Blank lines are allowed.

use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::DataError;
use crate::message::json_type_name;

/// Returns the lines that are not blank, with their numbers (from 1).
///
/// # Errors
/// The file is a JSON list.
pub(crate) fn lines<'a>(name: &Path, bytes: &'a [u8]) -> Result<Vec<(usize, &'a [u8])>, DataError> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(DataError::file(
            name,
            "is a JSON list; write JSON Lines instead: one object a line, without brackets and commas \
             around them",
        ));
    }
    let lines = bytes.split(|&byte| byte == b'\n').enumerate();
    Ok(lines.filter(|(_, line)| !line.trim_ascii().is_empty()).map(|(i, line)| (i + 1, line)).collect())
}

/// Parses the object on a line.
///
/// # Errors
/// The line is not a JSON object. The error names file, line and column.
pub(crate) fn parse_line(name: &Path, number: usize, line: &[u8]) -> Result<Map<String, Json>, DataError> {
    let at = |column: Option<usize>| match column {
        Some(column) => format!("{}:{number}:{column}", name.display()),
        None => format!("{}:{number}", name.display()),
    };
    match serde_json::from_slice(line) {
        Ok(Json::Object(row)) => Ok(row),
        Ok(other) => Err(DataError::Row {
            at: at(None),
            message: format!("the line is {}; a row is a JSON object", json_type_name(&other)),
        }),
        Err(err) => {
            // The message of serde_json ends with a position in which this line is line 1.
            let message = err.to_string();
            let message = message.split(" at line ").next().unwrap_or_default();
            Err(DataError::Row { at: at(Some(err.column())), message: format!("invalid JSON: {message}") })
        }
    }
}
