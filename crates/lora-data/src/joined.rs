//! The rows of several files.

use std::path::PathBuf;

use lora_spec::{DataSpec, SourceFile};
use sha2::{Digest, Sha256};

use crate::{DataError, DataReport, Dataset, TokenFiles, TokenRows, Tokenizer};

/// A file of a dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetFile {
    /// Its name, as the job calls it.
    pub name: PathBuf,
    /// SHA-256 of its bytes, in hex.
    pub sha256: String,
    /// How often an epoch has its rows.
    pub weight: f64,
    /// Statistics of its rows.
    pub report: DataReport,
}

impl DatasetFile {
    /// Returns its place in the order of an epoch.
    pub(crate) fn part(&self) -> DatasetPart {
        DatasetPart { rows: self.report.rows_kept, weight: self.weight }
    }

    /// Returns how many of its rows an epoch has, counting a row as often as it is used.
    pub fn epoch_rows(&self) -> usize {
        self.part().epoch_rows()
    }
}

/// The rows of a file among those of a dataset, which follow those of the file before.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DatasetPart {
    pub(crate) rows: usize,
    /// How often an epoch has them.
    pub(crate) weight: f64,
}

impl DatasetPart {
    /// How often an epoch has every row.
    pub(crate) fn copies(self) -> usize {
        self.weight as usize
    }

    /// How many rows, chosen at random, an epoch has once more.
    pub(crate) fn extra_rows(self) -> usize {
        (self.weight.fract() * self.rows as f64).round() as usize
    }

    /// The number of rows in an epoch.
    pub(crate) fn epoch_rows(self) -> usize {
        self.copies() * self.rows + self.extra_rows()
    }
}

impl Dataset {
    /// Reads the files of `data.train` like [`Dataset::inspect`], and joins their rows.
    ///
    /// # Errors
    /// Those of `inspect`, and a weight that takes no row of its file.
    pub fn inspect_all(
        files: &[SourceFile],
        tokenizer: &Tokenizer,
        data: &DataSpec,
        token_files: TokenFiles,
    ) -> Result<(Self, Vec<DataError>), DataError> {
        let mut datasets = Vec::with_capacity(files.len());
        let mut problems = Vec::new();
        for file in files {
            let (dataset, found) = Self::inspect(file, tokenizer, data, token_files)?;
            datasets.push(dataset);
            problems.extend(found);
        }
        let joined = match (datasets.len(), data.train_weights.is_empty()) {
            (1, true) => datasets.remove(0),
            _ => Self::join(datasets, &data.train_weights),
        };
        let is_unused = |file: &&DatasetFile| file.report.rows_kept > 0 && file.epoch_rows() == 0;
        if let Some(DatasetFile { name, weight, report, .. }) = joined.files.iter().find(is_unused) {
            let rows = report.rows_kept;
            let message = format!("data.train_weights: {weight} takes none of its {rows} rows; raise it");
            return Err(DataError::file(name, message));
        }
        Ok((joined, problems))
    }

    /// Joins the rows of datasets. Without weights each has 1.
    fn join(datasets: Vec<Self>, weights: &[f64]) -> Self {
        let mut hash = Sha256::new_with_prefix("lora-data files 1");
        let mut joined = Self {
            rows: TokenRows::default(),
            sha256: String::new(),
            report: DataReport::default(),
            token_files: Vec::new(),
            cache_problems: Vec::new(),
            files: Vec::new(),
        };
        let weights = weights.iter().copied().chain(std::iter::repeat(1.0));
        for (dataset, weight) in datasets.into_iter().zip(weights) {
            hash.update(&dataset.sha256);
            hash.update(weight.to_le_bytes());
            joined.files.extend(dataset.files.into_iter().map(|file| DatasetFile { weight, ..file }));
            joined.rows.append(dataset.rows);
            joined.report.join(dataset.report);
            joined.token_files.extend(dataset.token_files);
            joined.cache_problems.extend(dataset.cache_problems);
        }
        joined.sha256 = hex::encode(hash.finalize());
        joined.report.set_lengths(joined.lengths());
        joined
    }

    /// Returns the number of rows in an epoch, counting a row as often as it is used.
    pub fn epoch_rows(&self) -> usize {
        self.files.iter().map(DatasetFile::epoch_rows).sum()
    }

    /// Returns the number of tokens of each row, and how often an epoch has it.
    pub fn weighted_lengths(&self) -> impl Iterator<Item = (usize, f64)> {
        let of_file = |file: &DatasetFile| std::iter::repeat_n(file.weight, file.report.rows_kept);
        self.lengths().into_iter().zip(self.files.iter().flat_map(of_file))
    }

    /// What users should know about the rows ([`DataReport::notes`]). Names the files if there are
    /// several.
    pub fn notes(&self) -> Vec<String> {
        let of_file = |file: &DatasetFile| {
            let name = (self.files.len() > 1).then(|| format!("{}: ", file.name.display()));
            let name = name.unwrap_or_default();
            file.report.notes().into_iter().map(move |note| format!("{name}{note}")).collect::<Vec<_>>()
        };
        self.files.iter().flat_map(of_file).collect()
    }
}
