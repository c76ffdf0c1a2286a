//! The rows of a file before they are interpreted.

use serde_json::{Map, Value as Json};

use crate::DataError;

/// A row as a file has it.
pub(crate) enum RawRow {
    /// The text of a JSON object.
    Text(Vec<u8>),
    Object(Map<String, Json>),
}

/// A row with the number of its first line, or its number in a Parquet or Arrow file (from 1).
pub(crate) type NumberedRow = (usize, RawRow);

/// The rows of a file, in order.
pub(crate) struct RawRows<'a> {
    /// About how many rows there are, for showing the progress; `None` if it is not known.
    pub(crate) count: Option<usize>,
    pub(crate) rows: Box<dyn Iterator<Item = Result<NumberedRow, DataError>> + 'a>,
}

impl<'a> RawRows<'a> {
    pub(crate) fn new(
        count: Option<usize>,
        rows: impl Iterator<Item = Result<NumberedRow, DataError>> + 'a,
    ) -> Self {
        Self { count, rows: Box::new(rows) }
    }
}
