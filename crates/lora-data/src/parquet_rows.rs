//! Reads the rows of a Parquet file as JSON objects.

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Value as Json};

use crate::DataError;
use crate::raw_rows::{RawRow, RawRows};

/// Returns the rows, in the order of the file. A row is an error if its page is corrupt.
///
/// Null fields of a struct are omitted, because in a column of structs they cannot be distinguished
/// from absent keys. Byte strings without a type annotation are read as UTF-8.
///
/// # Errors
/// The file is truncated or corrupt.
pub(crate) fn read_rows<'a>(name: &'a Path, bytes: Bytes) -> Result<RawRows<'a>, DataError> {
    // The library checks the footer of a file, but not its pages. It panics if a page is corrupt.
    let corrupt = || unreadable(name, "a page is corrupt");
    let open = || {
        let reader = SerializedFileReader::new(bytes)?;
        let rows = reader.metadata().file_metadata().num_rows();
        Ok((usize::try_from(rows).unwrap_or(0), RowIter::from_file_into(Box::new(reader))))
    };
    let (count, mut rows) = catch_unwind(AssertUnwindSafe(open))
        .map_err(|_| corrupt())?
        .map_err(|err: ParquetError| unreadable(name, err))?;
    let mut number = 0;
    let next = move || {
        number += 1;
        let row = match catch_unwind(AssertUnwindSafe(|| rows.next())) {
            Ok(row) => row?.map_err(|err| unreadable(name, err)),
            Err(_) => Err(corrupt()),
        };
        Some(row.and_then(|row| match object(&row) {
            Ok(row) => Ok((number, RawRow::Object(row))),
            Err(message) => Err(DataError::Row { at: format!("{}, row {number}", name.display()), message }),
        }))
    };
    Ok(RawRows::new(Some(count), std::iter::from_fn(next)))
}

/// The largest number of characters of the library's reason: it may contain whole values.
const MAX_REASON: usize = 200;

fn unreadable(name: &Path, reason: impl Display) -> DataError {
    let reason: String = reason.to_string().chars().take(MAX_REASON).collect();
    DataError::file(name, format!("is not a readable Parquet file (truncated?): {reason}"))
}

fn object(row: &Row) -> Result<Map<String, Json>, String> {
    row.get_column_iter()
        .filter(|(_, field)| !matches!(field, Field::Null))
        .map(|(name, field)| Ok((name.clone(), field_json(field)?)))
        .collect()
}

/// Converts a value to JSON. Dates, times and decimals become texts.
///
/// # Errors
/// A byte string that is not UTF-8.
pub(crate) fn field_json(field: &Field) -> Result<Json, String> {
    Ok(match field {
        Field::Null => Json::Null,
        Field::Bool(value) => Json::from(*value),
        Field::Byte(value) => Json::from(*value),
        Field::Short(value) => Json::from(*value),
        Field::Int(value) => Json::from(*value),
        Field::Long(value) => Json::from(*value),
        Field::UByte(value) => Json::from(*value),
        Field::UShort(value) => Json::from(*value),
        Field::UInt(value) => Json::from(*value),
        Field::ULong(value) => Json::from(*value),
        Field::Float16(value) => Json::from(f32::from(*value)),
        Field::Float(value) => Json::from(*value),
        Field::Double(value) => Json::from(*value),
        Field::Str(value) => Json::from(value.as_str()),
        Field::Bytes(value) => bytes_text(value.data())?,
        Field::Group(row) => Json::Object(object(row)?),
        Field::ListInternal(list) => {
            Json::Array(list.elements().iter().map(field_json).collect::<Result<_, _>>()?)
        }
        Field::MapInternal(map) => {
            let mut object = Map::new();
            for (key, value) in map.entries() {
                object.insert(map_key(field_json(key)?), field_json(value)?);
            }
            Json::Object(object)
        }
        // The library writes a decimal without fraction as `5.`.
        Field::Decimal(_) => Json::from(field.to_string().trim_end_matches('.')),
        // Dates and times, as the Parquet library formats them.
        other => Json::from(other.to_string()),
    })
}

/// Converts a byte string to JSON.
///
/// # Errors
/// The bytes are not UTF-8.
pub(crate) fn bytes_text(bytes: &[u8]) -> Result<Json, String> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(Json::from(text)),
        Err(_) => Err("a byte string is not UTF-8".into()),
    }
}

/// The key of an object for the key of a map.
pub(crate) fn map_key(key: Json) -> String {
    match key {
        Json::String(key) => key,
        other => other.to_string(),
    }
}
