//! Reads a dataset file as token rows.

use std::fs;
use std::path::Path;

use lora_spec::{DataSpec, LongRows, RowFormat, SourceFile};
use rayon::prelude::*;
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use crate::encode::encode_row;
use crate::file_format::{FileFormat, FileKind};
use crate::row_format::take_row;
use crate::row_notes::RowNotes;
use crate::{DataError, DataReport, Tokenizer, arrow_rows, csv_rows, jsonl, parquet_rows};

/// A tokenized row with its loss mask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether token `i` is a target of the loss. It has the length of `tokens`. The first token is
    /// never a target, because no token precedes it.
    pub trained: Vec<bool>,
}

/// The rows of a dataset file, in the order of the file.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The kept rows; each has a target token.
    pub rows: Vec<Row>,
    /// SHA-256 of the file's bytes, in hex.
    pub sha256: String,
    /// Statistics of the file's rows.
    pub report: DataReport,
}

/// The samples of a row of the file, with its line or row number.
struct EncodedRow {
    number: usize,
    samples: Vec<Row>,
    format: RowFormat,
    ignored_keys: Vec<String>,
    notes: RowNotes,
}

impl Dataset {
    /// Reads JSON Lines or a JSON array (`.jsonl`, `.ndjson`, `.json`), CSV (`.csv`), Parquet
    /// (`.parquet`) or Arrow IPC (`.arrow`, `.feather`), JSON and CSV also compressed (`.gz`,
    /// `.zst`), and tokenizes the rows (see [`RowFormat`]) in parallel. The result does not depend
    /// on the number of threads.
    ///
    /// # Errors
    /// The first invalid row, named by file and line (Parquet, Arrow: row number); an empty file;
    /// rows longer than `data.max_length` tokens, depending on `data.long_rows`; rows without a
    /// target token; a token without an embedding (see [`Tokenizer::with_vocab_size`]).
    pub fn read(file: &SourceFile, tokenizer: &Tokenizer, data: &DataSpec) -> Result<Self, DataError> {
        let (dataset, problems) = Self::inspect(file, tokenizer, data)?;
        match problems.into_iter().next() {
            Some(problem) => Err(problem),
            None => Ok(dataset),
        }
    }

    /// Reads a dataset like [`Self::read`], but drops rows that are too long for `long_rows: error`
    /// or have no target, and counts them in the report. Their errors are returned with the
    /// dataset.
    ///
    /// # Errors
    /// The other errors of `read`.
    pub fn inspect(
        file: &SourceFile,
        tokenizer: &Tokenizer,
        data: &DataSpec,
    ) -> Result<(Self, Vec<DataError>), DataError> {
        let name = file.name();
        let format = FileFormat::from_name(name)?;
        let bytes = fs::read(file.path()).map_err(|source| DataError::read(file, source))?;
        let sha256 = hex::encode(Sha256::digest(&bytes));
        let (bytes, kind) = (format.decode(name, bytes.into())?, format.kind);
        let encode = |number, row| encode((name, kind), tokenizer, data, number, row);
        let encoded: Vec<Result<EncodedRow, DataError>> = match kind {
            FileKind::Json => jsonl::texts(name, &bytes)?
                .into_par_iter()
                .map(|(number, text)| encode(number, jsonl::parse(name, number, text)?))
                .collect(),
            FileKind::Csv => csv_rows::read_rows(name, &bytes)?
                .into_par_iter()
                .map(|(number, row)| encode(number, row))
                .collect(),
            FileKind::Arrow => arrow_rows::read_rows(name, bytes)?
                .into_par_iter()
                .map(|(number, row)| encode(number, row))
                .collect(),
            FileKind::Parquet => parquet_rows::read_rows(name, bytes)?
                .into_par_iter()
                .map(|(number, row)| encode(number, row))
                .collect(),
        };
        // The reported error must not depend on the threads, so it is the first one in the file's
        // order.
        let encoded = encoded.into_iter().collect::<Result<Vec<_>, _>>()?;
        if encoded.is_empty() {
            return Err(DataError::file(name, "has no rows"));
        }
        let mut report = DataReport { rows_read: encoded.len(), ..DataReport::default() };
        for row in &encoded {
            *report.formats.entry(row.format).or_default() += 1;
            for key in &row.ignored_keys {
                *report.ignored_keys.entry(key.clone()).or_default() += 1;
            }
            report.add(&row.notes);
        }
        let samples = encoded
            .into_iter()
            .flat_map(|EncodedRow { number, samples, .. }| samples.into_iter().map(move |row| (number, row)));
        let mut problems = Vec::new();
        let mut kept = apply_long_rows(name, kind, samples.collect(), data, &mut report, &mut problems);
        for (number, row) in &kept {
            let error = |message| DataError::Row { at: kind.location(name, *number), message };
            tokenizer.check_embedded(&row.tokens).map_err(error)?;
        }
        let has_target = |(_, row): &(usize, Row)| row.trained.contains(&true);
        let without: Vec<_> =
            kept.iter().filter(|row| !has_target(row)).map(|(number, _)| (*number, None)).collect();
        if !without.is_empty() {
            report.without_targets = without.len();
            let rows = kind.row_list(without);
            let name = name.to_owned();
            problems.push(DataError::NoTargets { name, rows, long_rows: data.long_rows });
            kept.retain(has_target);
        }
        let rows: Vec<Row> = kept.into_iter().map(|(_, row)| row).collect();
        report.set_lengths(rows.iter().map(|row| row.tokens.len()).collect());
        report.trained_tokens =
            rows.iter().map(|row| row.trained.iter().filter(|&&trained| trained).count() as u64).sum();
        Ok((Self { rows, sha256, report }, problems))
    }

    /// Returns the SHA-256, in hex, of the kept rows: of the tokens and the loss mask.
    pub fn tokens_sha256(&self) -> String {
        let mut hash = Sha256::new();
        for Row { tokens, trained } in &self.rows {
            hash.update((tokens.len() as u64).to_le_bytes());
            for (token, &trained) in tokens.iter().zip(trained) {
                hash.update((u64::from(*token) << 1 | u64::from(trained)).to_le_bytes());
            }
        }
        hex::encode(hash.finalize())
    }

    /// Returns the number of tokens of each row, for [`BatchPlan`](crate::BatchPlan).
    pub fn lengths(&self) -> Vec<usize> {
        self.rows.iter().map(|row| row.tokens.len()).collect()
    }
}

fn encode(
    (name, kind): (&Path, FileKind),
    tokenizer: &Tokenizer,
    data: &DataSpec,
    number: usize,
    mut row: Map<String, Json>,
) -> Result<EncodedRow, DataError> {
    let error = |message: String| DataError::Row { at: kind.location(name, number), message };
    let (format, content) = take_row(data, &mut row).map_err(error)?;
    let mut notes = RowNotes::default();
    let samples = encode_row(tokenizer, data, content, &mut notes).map_err(|err| error(err.to_string()))?;
    let ignored_keys = row.into_iter().filter(|(_, value)| !value.is_null()).map(|(key, _)| key).collect();
    Ok(EncodedRow { number, samples, format, ignored_keys, notes })
}

/// Applies `long_rows`, and adds an error to `problems` if it refuses the rows.
fn apply_long_rows(
    name: &Path,
    kind: FileKind,
    mut rows: Vec<(usize, Row)>,
    data: &DataSpec,
    report: &mut DataReport,
    problems: &mut Vec<DataError>,
) -> Vec<(usize, Row)> {
    let max_length = data.max_length;
    let is_long = |(_, row): &(usize, Row)| row.tokens.len() > max_length;
    let long: Vec<_> = rows
        .iter()
        .filter(|row| is_long(row))
        .map(|(number, row)| (*number, Some(row.tokens.len())))
        .collect();
    if long.is_empty() {
        return rows;
    }
    if data.long_rows == LongRows::Truncate {
        report.truncated = long.len();
        for (_, row) in &mut rows {
            row.tokens.truncate(max_length);
            row.trained.truncate(max_length);
        }
        return rows;
    }
    report.dropped = long.len();
    rows.retain(|row| !is_long(row));
    if data.long_rows == LongRows::Error {
        problems.push(DataError::LongRows { name: name.to_owned(), max_length, rows: kind.row_list(long) });
    } else if rows.is_empty() {
        problems.push(DataError::NothingLeft { name: name.to_owned(), total: long.len(), max_length });
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_tokens_depends_on_tokens_masks_and_rows() {
        let dataset = |rows: &[(&[u32], &[bool])]| Dataset {
            rows: rows
                .iter()
                .map(|(tokens, trained)| Row { tokens: tokens.to_vec(), trained: trained.to_vec() })
                .collect(),
            sha256: String::new(),
            report: DataReport::default(),
        };
        let expected = hex::encode(Sha256::digest([2_u64, 14, 19].map(u64::to_le_bytes).concat()));
        assert_eq!(dataset(&[(&[7, 9], &[false, true])]).tokens_sha256(), expected);
        for other in [
            dataset(&[(&[7, 8], &[false, true])]),
            dataset(&[(&[7, 9], &[true, true])]),
            dataset(&[(&[7], &[false]), (&[9], &[true])]),
            dataset(&[]),
        ] {
            assert_ne!(other.tokens_sha256(), expected);
        }
    }
}
