//! The rows of a dataset file as tokens, before the settings about lengths are applied.

use std::cell::Cell;
use std::io::{BufReader, Read};
use std::path::Path;

use lora_spec::{DataSpec, RowFormat, SourceFile};
use rayon::prelude::*;
use serde_json::Value as Json;

use crate::encode::encode_row;
use crate::file_format::{FileFormat, FileKind};
use crate::hashed_file::HashedFile;
use crate::raw_rows::{NumberedRow, RawRow, RawRows};
use crate::row_format::{TakenRow, take_row};
use crate::row_notes::RowNotes;
use crate::{DataError, DataReport, Row, TokenRows, Tokenizer, arrow_rows, csv_rows, jsonl, parquet_rows};

/// The number of rows that are parsed and encoded in parallel. The texts of so many rows are in
/// memory at a time.
const CHUNK_ROWS: usize = 4096;

/// The rows of a dataset file as tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct EncodedRows {
    /// The samples of all rows.
    pub(crate) rows: TokenRows,
    /// The line or row number of each sample (from 1).
    pub(crate) numbers: Vec<u64>,
    /// The statistics that do not depend on lengths.
    pub(crate) report: DataReport,
}

/// What the rows of a file are encoded with.
struct Encoder<'a> {
    name: &'a Path,
    kind: FileKind,
    tokenizer: &'a Tokenizer,
    data: &'a DataSpec,
}

/// The samples of a row.
struct EncodedRow {
    number: usize,
    samples: Vec<Row>,
    format: RowFormat,
    renamed: Vec<String>,
    has_system_prompt: bool,
    ignored_keys: Vec<String>,
    notes: RowNotes,
}

impl EncodedRows {
    /// Encodes the rows of `file`, whose bytes have this SHA-256, and calls `progress` with the
    /// share of the file that is encoded.
    ///
    /// # Errors
    /// The first invalid row; a file without rows, or one that has changed.
    pub(crate) fn from_file(
        file: &SourceFile,
        sha256: &str,
        tokenizer: &Tokenizer,
        data: &DataSpec,
        progress: &dyn Fn(f64),
    ) -> Result<Self, DataError> {
        let name = file.name();
        let format = FileFormat::from_name(name)?;
        let read = Cell::new(0);
        let mut hashed = HashedFile::open(file, &read).map_err(|source| DataError::read(file, source))?;
        let size = hashed.size();
        let encoder = Encoder { name, kind: format.kind, tokenizer, data };
        let failed = |error| format.read_error(file, error);
        let mut reader = format.decoded(file, BufReader::new(&mut hashed))?;
        let encoded = if format.kind == FileKind::Json && !jsonl::is_array(&mut reader).map_err(failed)? {
            let lines = jsonl::lines(reader).map(|line| line.map_err(failed));
            encoder.encode(lines, |_| progress(read.get() as f64 / size as f64))?
        } else {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).map_err(failed)?;
            drop(reader);
            let RawRows { count, rows } = match format.kind {
                FileKind::Json => jsonl::array(name, &bytes)?,
                FileKind::Csv => csv_rows::read_rows(name, &bytes)?,
                FileKind::Parquet => parquet_rows::read_rows(name, bytes.into())?,
                FileKind::Arrow => arrow_rows::read_rows(name, bytes.into())?,
            };
            encoder
                .encode(rows, |encoded| progress(count.map_or(0.0, |count| encoded as f64 / count as f64)))?
        };
        if hashed.finish().map_err(|source| DataError::read(file, source))? != sha256 {
            return Err(DataError::file(name, "was changed while it was read; try again"));
        }
        if encoded.report.rows_read == 0 {
            return Err(DataError::file(name, "has no rows"));
        }
        Ok(encoded)
    }

    fn add(&mut self, row: EncodedRow) {
        let report = &mut self.report;
        report.rows_read += 1;
        *report.formats.entry(row.format).or_default() += 1;
        for key in row.renamed {
            *report.renamed_columns.entry(key).or_default() += 1;
        }
        report.system_prompts += usize::from(row.has_system_prompt);
        for key in row.ignored_keys {
            *report.ignored_keys.entry(key).or_default() += 1;
        }
        report.add(&row.notes);
        for sample in &row.samples {
            self.rows.push(sample);
            self.numbers.push(row.number as u64);
        }
    }
}

impl Encoder<'_> {
    /// Encodes rows in parallel. The result does not depend on the number of threads: an error is
    /// the first one in the order of the file. `progress` gets the number of rows so far.
    fn encode(
        &self,
        mut rows: impl Iterator<Item = Result<NumberedRow, DataError>>,
        progress: impl Fn(usize),
    ) -> Result<EncodedRows, DataError> {
        let mut encoded = EncodedRows::default();
        loop {
            let mut chunk = Vec::new();
            let mut failed = Ok(());
            for row in rows.by_ref().take(CHUNK_ROWS) {
                match row {
                    Ok(row) => chunk.push(row),
                    Err(error) => {
                        failed = Err(error);
                        break;
                    }
                }
            }
            let is_end = chunk.len() < CHUNK_ROWS;
            let chunk: Vec<_> = chunk.into_par_iter().map(|(number, row)| self.row(number, row)).collect();
            for row in chunk {
                encoded.add(row?);
            }
            failed?;
            progress(encoded.report.rows_read);
            if is_end {
                return Ok(encoded);
            }
        }
    }

    fn row(&self, number: usize, row: RawRow) -> Result<EncodedRow, DataError> {
        let mut row = match row {
            RawRow::Text(text) => jsonl::parse(self.name, number, &text)?,
            RawRow::Object(row) => row,
        };
        let error = |message| DataError::Row { at: self.kind.location(self.name, number), message };
        let TakenRow { format, content, renamed, has_system_prompt } =
            take_row(self.data, &mut row).map_err(error)?;
        let mut notes = RowNotes::default();
        let samples = encode_row(self.tokenizer, self.data, content, &mut notes)
            .map_err(|err| error(err.to_string()))?;
        let is_ignored = |(key, value): (String, Json)| (!value.is_null()).then_some(key);
        let ignored_keys = row.into_iter().filter_map(is_ignored).collect();
        Ok(EncodedRow { number, samples, format, renamed, has_system_prompt, ignored_keys, notes })
    }
}
