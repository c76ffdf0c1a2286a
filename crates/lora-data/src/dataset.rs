//! Reads a dataset file as token rows.

use std::cell::Cell;

use lora_spec::{DataSpec, LongRows, SourceFile};
use sha2::{Digest, Sha256};

use crate::encoded_rows::EncodedRows;
use crate::file_format::{FileFormat, FileKind};
use crate::hashed_file::HashedFile;
use crate::token_rows::TokenRow;
use crate::{DataError, DataReport, DatasetFile, TokenFiles, TokenRows, Tokenizer};

/// A tokenized row with its loss mask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether token `i` is a target of the loss. It has the length of `tokens`. The first token is
    /// never a target, because no token precedes it.
    pub trained: Vec<bool>,
}

/// The rows of one or several dataset files, in the order of the files.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The kept rows; each has a target token.
    pub rows: TokenRows,
    /// SHA-256 of the file's bytes, in hex; of several files, of their hashes and weights.
    pub sha256: String,
    /// Statistics of the rows.
    pub report: DataReport,
    /// The files, in the order of their rows.
    pub files: Vec<DatasetFile>,
    /// The files with the tokens of the rows.
    pub token_files: Vec<SourceFile>,
    /// Why tokens could not be kept, for users.
    pub cache_problems: Vec<String>,
}

impl Dataset {
    /// Reads JSON Lines or a JSON array (`.jsonl`, `.ndjson`, `.json`), CSV (`.csv`), Parquet
    /// (`.parquet`) or Arrow IPC (`.arrow`, `.feather`), JSON and CSV also compressed (`.gz`,
    /// `.zst`), and tokenizes the rows (see [`RowFormat`](lora_spec::RowFormat)) in parallel. The
    /// result does not depend on the number of threads.
    ///
    /// # Errors
    /// The first invalid row, named by file and line (Parquet, Arrow: row number); an empty file;
    /// rows longer than `data.max_length` tokens, depending on `data.long_rows`; rows without a
    /// target token; a token without an embedding (see [`Tokenizer::with_vocab_size`]).
    pub fn read(file: &SourceFile, tokenizer: &Tokenizer, data: &DataSpec) -> Result<Self, DataError> {
        Self::read_with(file, tokenizer, data, TokenFiles::default())
    }

    /// Like [`Self::read`], but uses the rows in `token_files`, and keeps them there.
    pub fn read_with(
        file: &SourceFile,
        tokenizer: &Tokenizer,
        data: &DataSpec,
        token_files: TokenFiles,
    ) -> Result<Self, DataError> {
        Self::inspect(file, tokenizer, data, token_files).and_then(without_problems)
    }

    /// Reads the files of `data.train` like [`Self::read_with`], and joins their rows.
    ///
    /// # Errors
    /// Those of [`Self::read`], and a weight that takes no row of its file.
    pub fn read_all(
        files: &[SourceFile],
        tokenizer: &Tokenizer,
        data: &DataSpec,
        token_files: TokenFiles,
    ) -> Result<Self, DataError> {
        Self::inspect_all(files, tokenizer, data, token_files).and_then(without_problems)
    }

    /// Reads a dataset like [`Self::read_with`], but drops rows that are too long for
    /// `long_rows: error` or have no target, and counts them in the report. Their errors are
    /// returned with the dataset.
    ///
    /// # Errors
    /// The other errors of `read`.
    pub fn inspect(
        file: &SourceFile,
        tokenizer: &Tokenizer,
        data: &DataSpec,
        token_files: TokenFiles,
    ) -> Result<(Self, Vec<DataError>), DataError> {
        let kind = FileFormat::from_name(file.name())?.kind;
        let hash = || HashedFile::open(file, &Cell::new(0))?.finish();
        let sha256 = hash().map_err(|source| DataError::read(file, source))?;
        let (encoded, token_file, cache_problem) =
            token_files.rows(file, (kind, &sha256), tokenizer, data)?;
        let EncodedRows { mut rows, numbers, mut report } = encoded;
        let mut lengths = Vec::with_capacity(rows.len());
        let (mut long, mut without_targets, mut not_embedded) = (Vec::new(), Vec::new(), None);
        let max_length = data.max_length;
        rows.shorten(|index, row| {
            let number = numbers[index] as usize;
            if row.len() > max_length {
                long.push((number, Some(row.len())));
                if data.long_rows != LongRows::Truncate {
                    return 0;
                }
            }
            let kept = row.first(max_length);
            if not_embedded.is_none() {
                not_embedded = tokenizer.check_embedded(kept).err().map(|message| (number, message));
            }
            let trained = kept.trained().filter(|trained| *trained).count();
            if trained == 0 {
                without_targets.push((number, None));
                return 0;
            }
            lengths.push(kept.len());
            report.trained_tokens += trained as u64;
            kept.len()
        });
        if let Some((number, message)) = not_embedded {
            return Err(DataError::Row { at: kind.location(file.name(), number), message });
        }
        let is_truncated = data.long_rows == LongRows::Truncate;
        *(if is_truncated { &mut report.truncated } else { &mut report.dropped }) = long.len();
        report.without_targets = without_targets.len();
        report.set_lengths(lengths);
        let problems = problems((file, kind), data, numbers.len(), long, without_targets);
        let token_files = token_file.into_iter().collect();
        let cache_problems = cache_problem.into_iter().collect();
        let (name, report_of_file) = (file.name().to_owned(), report.clone());
        let files = vec![DatasetFile { name, sha256: sha256.clone(), weight: 1.0, report: report_of_file }];
        Ok((Self { rows, sha256, report, files, token_files, cache_problems }, problems))
    }

    /// Returns the SHA-256, in hex, of the kept rows: of the tokens and the loss mask.
    pub fn tokens_sha256(&self) -> String {
        let mut hash = Sha256::new();
        let mut bytes = Vec::new();
        for row in self.rows.iter() {
            hash.update((row.len() as u64).to_le_bytes());
            bytes.clear();
            bytes.extend(row.words().iter().flat_map(|word| u64::from(*word).to_le_bytes()));
            hash.update(&bytes);
        }
        hex::encode(hash.finalize())
    }

    /// Returns the number of tokens of each row, for [`BatchPlan`](crate::BatchPlan).
    pub fn lengths(&self) -> Vec<usize> {
        self.rows.iter().map(TokenRow::len).collect()
    }
}

/// Makes the first problem of an inspected dataset an error.
fn without_problems((dataset, problems): (Dataset, Vec<DataError>)) -> Result<Dataset, DataError> {
    match problems.into_iter().next() {
        Some(problem) => Err(problem),
        None => Ok(dataset),
    }
}

/// The errors about the rows that are too long or have no target, of so many samples.
fn problems(
    (file, kind): (&SourceFile, FileKind),
    data: &DataSpec,
    samples: usize,
    long: Vec<(usize, Option<usize>)>,
    without_targets: Vec<(usize, Option<usize>)>,
) -> Vec<DataError> {
    let name = file.name().to_owned();
    let mut problems = Vec::new();
    let (is_long, total) = (!long.is_empty(), long.len());
    match data.long_rows {
        LongRows::Error if is_long => {
            let rows = kind.row_list(long);
            problems.push(DataError::LongRows { name: name.clone(), max_length: data.max_length, rows });
        }
        LongRows::Drop if is_long && total == samples => {
            let max_length = data.max_length;
            problems.push(DataError::NothingLeft { name: name.clone(), total, max_length });
        }
        _ => {}
    }
    if !without_targets.is_empty() {
        let rows = kind.row_list(without_targets);
        problems.push(DataError::NoTargets { name, rows, long_rows: data.long_rows });
    }
    problems
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
            files: Vec::new(),
            token_files: Vec::new(),
            cache_problems: Vec::new(),
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
