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
    Ok(RawRows::new(count, std::iter::from_fn(next)))
}

fn unreadable(name: &Path, reason: impl Display) -> DataError {
    DataError::file(name, format!("is not a readable Parquet file (truncated?): {reason}"))
}

fn object(row: &Row) -> Result<Map<String, Json>, String> {
    row.get_column_iter()
        .filter(|(_, field)| !matches!(field, Field::Null))
        .map(|(name, field)| Ok((name.clone(), json(field)?)))
        .collect()
}

fn json(field: &Field) -> Result<Json, String> {
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
        Field::Float(value) => Json::from(*value),
        Field::Double(value) => Json::from(*value),
        Field::Str(value) => Json::from(value.as_str()),
        Field::Bytes(value) => match std::str::from_utf8(value.data()) {
            Ok(text) => Json::from(text),
            Err(_) => return Err("a byte string is not UTF-8".into()),
        },
        Field::Group(row) => Json::Object(object(row)?),
        Field::ListInternal(list) => Json::Array(list.elements().iter().map(json).collect::<Result<_, _>>()?),
        Field::MapInternal(map) => {
            let mut object = Map::new();
            for (key, value) in map.entries() {
                match json(key)? {
                    Json::String(key) => object.insert(key, json(value)?),
                    other => object.insert(other.to_string(), json(value)?),
                };
            }
            Json::Object(object)
        }
        // Dates, times and decimals, as the Parquet library formats them.
        other => Json::from(other.to_string()),
    })
}
