//! JSON Lines: a JSON object on each line. Blank lines are allowed. A file that begins with `[` is
//! one JSON array of objects.

use std::io::{self, BufRead, Read};
use std::path::Path;

use serde_json::value::RawValue;
use serde_json::{Map, Value as Json};

use crate::DataError;
use crate::message::json_type_name;
use crate::raw_rows::{NumberedRow, RawRow, RawRows};

/// Skips a byte order mark, and returns whether the text begins with `[`, at most after spaces.
pub(crate) fn is_array(text: &mut impl BufRead) -> io::Result<bool> {
    if text.fill_buf()?.starts_with(b"\xEF\xBB\xBF") {
        text.consume(3);
    }
    Ok(text.fill_buf()?.trim_ascii_start().starts_with(b"["))
}

/// The largest size of a row, in bytes.
const MAX_ROW_BYTES: u64 = 64 << 20;

/// Returns the lines that are not blank, with their numbers (from 1). A line that is too long is
/// the last one.
pub(crate) fn lines(mut text: impl BufRead) -> impl Iterator<Item = io::Result<NumberedRow>> {
    let (mut number, mut is_end) = (0, false);
    std::iter::from_fn(move || {
        while !is_end {
            let mut line = Vec::new();
            let read = text.by_ref().take(MAX_ROW_BYTES + 1).read_until(b'\n', &mut line);
            number += 1;
            match read {
                Err(error) => {
                    is_end = true;
                    return Some(Err(error));
                }
                Ok(0) => return None,
                Ok(_) if line.len() as u64 > MAX_ROW_BYTES => {
                    is_end = true;
                    let message = format!(
                        "line {number} has more than {} MiB; each line must be a row",
                        MAX_ROW_BYTES >> 20
                    );
                    return Some(Err(io::Error::other(message)));
                }
                Ok(_) => {}
            }
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            if !line.trim_ascii().is_empty() {
                return Some(Ok((number, RawRow::Text(line))));
            }
        }
        None
    })
}

/// Returns the elements of a JSON array, with the numbers of their first lines (from 1).
///
/// # Errors
/// The text is not a JSON array.
pub(crate) fn array<'a>(name: &Path, bytes: &'a [u8]) -> Result<RawRows<'a>, DataError> {
    let items: Vec<&RawValue> = serde_json::from_slice(bytes).map_err(|error| DataError::Row {
        at: format!("{}:{}:{}", name.display(), error.line(), error.column()),
        message: format!("invalid JSON: {}", reason(&error)),
    })?;
    let (count, mut line, mut at) = (items.len(), 1, 0);
    Ok(RawRows::new(
        Some(count),
        items.into_iter().map(move |item| {
            let text = item.get().as_bytes();
            let start = text.as_ptr().addr() - bytes.as_ptr().addr();
            line += bytes[at..start].iter().filter(|&&byte| byte == b'\n').count();
            at = start;
            Ok((line, RawRow::Text(text.to_vec())))
        }),
    ))
}

/// Parses the object of a row.
///
/// # Errors
/// The text is not a JSON object. The error names file, line and column.
pub(crate) fn parse(name: &Path, number: usize, text: &[u8]) -> Result<Map<String, Json>, DataError> {
    if let Some(digits) = long_integer(text) {
        return Err(DataError::Row {
            at: format!("{}:{number}", name.display()),
            message: format!("an integer of {digits} digits is not supported; write it as a string"),
        });
    }
    match serde_json::from_slice(text) {
        Ok(Json::Object(row)) => Ok(row),
        Ok(other) => Err(DataError::Row {
            at: format!("{}:{number}", name.display()),
            message: format!("the row is {}; it must be a JSON object", json_type_name(&other)),
        }),
        Err(_) if std::str::from_utf8(text).is_err() => Err(DataError::Row {
            at: format!("{}:{number}", name.display()),
            message: "is not UTF-8; convert the file".to_owned(),
        }),
        Err(error) if error.is_eof() => Err(DataError::Row {
            at: format!("{}:{}:{}", name.display(), number + error.line().max(1) - 1, error.column()),
            message: format!(
                "invalid JSON: {}; each line must be a whole object, or the file one JSON array",
                reason(&error)
            ),
        }),
        Err(error) => Err(DataError::Row {
            // The position counts from the row's first line.
            at: format!("{}:{}:{}", name.display(), number + error.line().max(1) - 1, error.column()),
            message: format!("invalid JSON: {}", reason(&error)),
        }),
    }
}

/// The number of digits of an integer that does not fit 64 bits, outside of strings: it would
/// become a float.
fn long_integer(text: &[u8]) -> Option<usize> {
    let is_long = |run: &[u8]| run.len() >= 19 && run.iter().all(u8::is_ascii_digit);
    if !text.windows(19).any(is_long) {
        return None;
    }
    let mut is_string = false;
    let mut at = 0;
    while at < text.len() {
        match text[at] {
            b'\\' => at += 1,
            b'"' => is_string = !is_string,
            b'0'..=b'9' if !is_string => {
                let run = text[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                let is_part = |byte: Option<&u8>| byte.is_some_and(|byte| b".eE".contains(byte));
                let is_integer =
                    !is_part(text.get(at + run)) && !is_part(at.checked_sub(1).map(|i| &text[i]));
                let digits = std::str::from_utf8(&text[at..at + run]).unwrap_or_default();
                if is_integer && digits.parse::<u64>().is_err() {
                    return Some(run);
                }
                at += run;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// The message of serde_json, which ends with a position.
fn reason(error: &serde_json::Error) -> String {
    error.to_string().split(" at line ").next().unwrap_or_default().to_owned()
}
