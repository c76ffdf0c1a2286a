//! Reads the rows of an Arrow IPC file or stream as JSON objects.
//!
//! The file format is a stream between two magic strings, with a footer that has the places of the
//! messages. A stream is a sequence of messages: a schema, dictionaries and record batches.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::vec;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_buffer::Buffer;
use arrow_ipc::convert::try_fb_to_schema;
use arrow_ipc::reader::{read_dictionary, read_footer_length, read_record_batch};
use arrow_ipc::{Message, MessageHeader, root_as_footer, root_as_message};
use arrow_schema::SchemaRef;
use bytes::Bytes;
use serde_json::{Map, Value as Json};

use crate::DataError;
use crate::arrow_values::{check_type, row_object};
use crate::raw_rows::{RawRow, RawRows};

/// The bytes with which a file begins, without its padding.
pub(crate) const MAGIC: &[u8] = b"ARROW1";

/// The bytes with which a message begins, before its length.
pub(crate) const CONTINUATION: &[u8] = &[0xFF; 4];

/// The size of a file's end: the length of its footer and the magic string.
const TRAILER: usize = 10;

/// The number of rows from which on a batch must have bytes for them.
const MAX_EMPTY_ROWS: usize = 1 << 20;

/// Returns the rows, in the order of the file. Null columns and null fields of structs are omitted.
///
/// # Errors
/// The file is truncated or corrupt, or a column has an unsupported type.
pub(crate) fn read_rows<'a>(name: &Path, bytes: Bytes) -> Result<RawRows<'a>, DataError> {
    let rows = ArrowReader::new(name, bytes)?.flat_map(|batch| match batch {
        Ok(rows) => rows.into_iter().map(|(number, row)| Ok((number, RawRow::Object(row)))).collect(),
        Err(error) => vec![Err(error)],
    });
    Ok(RawRows::new(None, rows))
}

/// A row with its number (from 1).
type NumberedObject = (usize, Map<String, Json>);

/// Reads the rows of a file, one record batch at a time.
pub(crate) struct ArrowReader {
    name: PathBuf,
    bytes: Buffer,
    schema: SchemaRef,
    dictionaries: HashMap<i64, ArrayRef>,
    position: Position,
    rows_read: usize,
}

/// Where the next record batch is.
enum Position {
    /// The places of the file's remaining record batches.
    File(vec::IntoIter<usize>),
    /// The place of a stream's next message.
    Stream(usize),
    /// All batches are read, or an error was returned.
    End,
}

/// A message in the bytes of the file.
struct Encapsulated {
    metadata: Range<usize>,
}

impl ArrowReader {
    /// Reads the schema, and of a file also the dictionaries.
    ///
    /// # Errors
    /// The schema is corrupt, or a column has an unsupported type.
    pub(crate) fn new(name: &Path, bytes: Bytes) -> Result<Self, DataError> {
        let open =
            || if bytes.starts_with(MAGIC) { open_file(name, bytes) } else { open_stream(name, bytes) };
        let reader = catch_panics(open).map_err(|reason| unreadable(name, &reason))?;
        let mut names = BTreeSet::new();
        for field in reader.schema.fields() {
            check_type(field).map_err(|reason| DataError::file(name, reason))?;
            if !names.insert(field.name()) {
                return Err(DataError::file(name, format!("has the column {:?} twice", field.name())));
            }
        }
        Ok(reader)
    }

    /// Returns the next record batch; `None` at the end.
    fn next_batch(&mut self) -> Result<Option<RecordBatch>, String> {
        loop {
            let (message, is_file) = match &mut self.position {
                Position::End => return Ok(None),
                Position::File(places) => {
                    let Some(at) = places.next() else { return Ok(None) };
                    (message_at(&self.bytes, at)?.ok_or("a record batch is missing")?, true)
                }
                Position::Stream(at) => {
                    let Some(message) = message_at(&self.bytes, *at)? else {
                        check_end(&self.bytes[*at..])?;
                        return Ok(None);
                    };
                    (message, false)
                }
            };
            let header = message.parse(&self.bytes)?;
            let body = message.body(&self.bytes, &header)?;
            if !is_file {
                self.position = Position::Stream(body.end);
            }
            match header.header_type() {
                MessageHeader::RecordBatch => {
                    let body = self.bytes.slice_with_length(body.start, body.len());
                    let batch = header.header_as_record_batch().ok_or("a record batch has no contents")?;
                    check_buffers(&batch, &body)?;
                    let batch = read_record_batch(
                        &body,
                        batch,
                        Arc::clone(&self.schema),
                        &self.dictionaries,
                        None,
                        &header.version(),
                    );
                    let batch = batch.map_err(|error| error.to_string())?;
                    let bits = batch.get_array_memory_size().saturating_mul(8);
                    if batch.num_rows() > bits.max(MAX_EMPTY_ROWS) {
                        return Err(format!("a batch has {} rows without values", batch.num_rows()));
                    }
                    return Ok(Some(batch));
                }
                MessageHeader::DictionaryBatch if !is_file => {
                    add_dictionary(&self.bytes, &header, body, &self.schema, &mut self.dictionaries)?;
                }
                other => return Err(format!("a message is a {other:?}, not a record batch")),
            }
        }
    }

    fn next_rows(&mut self) -> Result<Option<Vec<NumberedObject>>, DataError> {
        let rows = catch_panics(|| {
            let Some(batch) = self.next_batch()? else { return Ok(None) };
            let rows = (0..batch.num_rows()).map(|i| (self.rows_read + i + 1, row_object(&batch, i)));
            Ok(Some(rows.collect::<Vec<_>>()))
        });
        let Some(rows) = rows.map_err(|reason| unreadable(&self.name, &reason))? else { return Ok(None) };
        self.rows_read += rows.len();
        let of_row = |(number, row): (usize, Result<_, String>)| match row {
            Ok(row) => Ok((number, row)),
            Err(message) => {
                Err(DataError::Row { at: format!("{}, row {number}", self.name.display()), message })
            }
        };
        rows.into_iter().map(of_row).collect::<Result<_, _>>().map(Some)
    }
}

impl Iterator for ArrowReader {
    type Item = Result<Vec<NumberedObject>, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rows = self.next_rows().transpose();
        if !matches!(rows, Some(Ok(_))) {
            self.position = Position::End;
        }
        rows
    }
}

fn open_file(name: &Path, bytes: Bytes) -> Result<ArrowReader, String> {
    let bytes = Buffer::from(bytes);
    let (before, trailer) = bytes.split_last_chunk::<TRAILER>().ok_or("it ends within its header")?;
    let length = read_footer_length(*trailer).map_err(|error| error.to_string())?;
    let start = before.len().checked_sub(length).ok_or("its footer is longer than the file")?;
    let footer = root_as_footer(&before[start..]).map_err(|error| format!("invalid footer: {error}"))?;
    let schema = schema_of(footer.schema())?;
    let place = |block: &arrow_ipc::Block| {
        usize::try_from(block.offset()).map_err(|_| "a message is outside of the file".to_owned())
    };
    let mut dictionaries = HashMap::new();
    for block in footer.dictionaries().into_iter().flatten() {
        let message = message_at(&bytes, place(block)?)?.ok_or("a dictionary is missing")?;
        let header = message.parse(&bytes)?;
        let body = message.body(&bytes, &header)?;
        add_dictionary(&bytes, &header, body, &schema, &mut dictionaries)?;
    }
    let places = footer.recordBatches().into_iter().flatten().map(place).collect::<Result<Vec<_>, _>>()?;
    let position = Position::File(places.into_iter());
    Ok(ArrowReader { name: name.to_owned(), bytes, schema, dictionaries, position, rows_read: 0 })
}

fn open_stream(name: &Path, bytes: Bytes) -> Result<ArrowReader, String> {
    let bytes = Buffer::from(bytes);
    if bytes.is_empty() {
        return Err("it is empty".into());
    }
    let message = message_at(&bytes, 0)?.ok_or("it has no schema")?;
    let header = message.parse(&bytes)?;
    let schema = schema_of(header.header_as_schema())?;
    let position = Position::Stream(message.body(&bytes, &header)?.end);
    let dictionaries = HashMap::new();
    Ok(ArrowReader { name: name.to_owned(), bytes, schema, dictionaries, position, rows_read: 0 })
}

fn schema_of(schema: Option<arrow_ipc::Schema<'_>>) -> Result<SchemaRef, String> {
    let schema = schema.ok_or("it has no schema")?;
    if !schema.endianness().equals_to_target_endianness() {
        return Err("its numbers are big-endian".into());
    }
    try_fb_to_schema(schema).map(Arc::new).map_err(|error| error.to_string())
}

/// Returns the message at a place; `None` if there is the end of the stream.
fn message_at(bytes: &[u8], at: usize) -> Result<Option<Encapsulated>, String> {
    let word = |at: usize| bytes.get(at..)?.first_chunk::<4>().copied();
    // A stream that ends without a marker cannot be told from a truncated one.
    let missing = "it ends without the marker of its end; it is truncated, or its writer was not closed";
    let first = word(at).ok_or(missing)?;
    // Before version 0.15 of Arrow a message began with its length.
    let (length, start) = match first == CONTINUATION {
        true => (word(at + 4).ok_or(missing)?, at + 8),
        false => (first, at + 4),
    };
    let length =
        usize::try_from(i32::from_le_bytes(length)).map_err(|_| "a message has a negative length")?;
    if length == 0 {
        return Ok(None);
    }
    match start.checked_add(length).filter(|end| *end <= bytes.len()) {
        Some(end) => Ok(Some(Encapsulated { metadata: start..end })),
        None => Err("it ends within a message".into()),
    }
}

/// Checks that nothing but zeros follows the marker of a stream's end.
fn check_end(marker: &[u8]) -> Result<(), String> {
    let rest = marker.strip_prefix(CONTINUATION).unwrap_or(marker);
    match rest.iter().all(|&byte| byte == 0) {
        true => Ok(()),
        false => Err("it goes on after the marker of its end; several streams must be several files, which \
                      data.train lists"
            .into()),
    }
}

impl Encapsulated {
    fn parse<'a>(&self, bytes: &'a [u8]) -> Result<Message<'a>, String> {
        root_as_message(&bytes[self.metadata.clone()]).map_err(|error| format!("invalid message: {error}"))
    }

    /// The place of the message's body.
    fn body(&self, bytes: &[u8], header: &Message<'_>) -> Result<Range<usize>, String> {
        let start = self.metadata.end;
        let length = usize::try_from(header.bodyLength()).ok();
        let end = length.and_then(|length| start.checked_add(length)).filter(|end| *end <= bytes.len());
        end.map(|end| start..end).ok_or_else(|| "it ends within a message".into())
    }
}

/// Reads a dictionary, or more values of one.
fn add_dictionary(
    bytes: &Buffer,
    header: &Message<'_>,
    body: Range<usize>,
    schema: &SchemaRef,
    dictionaries: &mut HashMap<i64, ArrayRef>,
) -> Result<(), String> {
    let body = bytes.slice_with_length(body.start, body.len());
    let batch = header.header_as_dictionary_batch().ok_or("a message is not a dictionary")?;
    check_buffers(&batch.data().ok_or("a dictionary has no values")?, &body)?;
    read_dictionary(&body, batch, schema, dictionaries, &header.version()).map_err(|error| error.to_string())
}

/// Checks the places of the buffers of a batch, and that the decompressed ones fit in memory: the
/// library allocates the sizes that they claim.
fn check_buffers(batch: &arrow_ipc::RecordBatch<'_>, body: &[u8]) -> Result<(), String> {
    let mut total: usize = 0;
    for buffer in batch.buffers().into_iter().flatten() {
        let (offset, length) = (usize::try_from(buffer.offset()).ok(), usize::try_from(buffer.length()).ok());
        let range = offset.zip(length).and_then(|(offset, length)| Some(offset..offset.checked_add(length)?));
        let bytes = range.and_then(|range| body.get(range)).ok_or("a buffer is outside of its message")?;
        if let (Some(_), Some(length)) = (batch.compression(), bytes.first_chunk()) {
            // A negative length says that the buffer is not compressed.
            total = total.saturating_add(usize::try_from(i64::from_le_bytes(*length)).unwrap_or(0));
        }
    }
    let reserved = Vec::<u8>::new().try_reserve_exact(total);
    reserved.map_err(|_| format!("a batch of {total} bytes, decompressed, does not fit in memory"))
}

/// Runs a reader that may panic at a corrupt file.
fn catch_panics<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("a message is corrupt".into()))
}

fn unreadable(name: &Path, reason: &str) -> DataError {
    // Errors of flatbuffers have a trace below their first line.
    let reason = reason.lines().next().unwrap_or_default().trim_end_matches('.');
    DataError::file(name, format!("is not a readable Arrow file (truncated?): {reason}"))
}

#[cfg(test)]
mod tests;
