//! The rows of several files.

use lora_spec::{DataSpec, SourceFile};
use sha2::{Digest, Sha256};

use crate::{DataError, DataReport, Dataset, TokenFiles, TokenRows, Tokenizer};

/// The rows of a file among those of several.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetPart {
    /// The number of its rows, which follow those of the part before.
    pub rows: usize,
    /// How often an epoch has them.
    pub weight: f64,
}

impl DatasetPart {
    /// How often an epoch has every row.
    pub(crate) fn copies(&self) -> usize {
        self.weight as usize
    }

    /// How many rows, chosen at random, an epoch has once more.
    pub(crate) fn extra_rows(&self) -> usize {
        (self.weight.fract() * self.rows as f64).round() as usize
    }

    /// The number of rows in an epoch.
    pub(crate) fn epoch_rows(&self) -> usize {
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
        let unused = joined.parts.iter().zip(files).find(|(part, _)| part.rows > 0 && part.epoch_rows() == 0);
        if let Some((part, file)) = unused {
            let (weight, rows) = (part.weight, part.rows);
            let message = format!("data.train_weights: {weight} takes none of its {rows} rows; raise it");
            return Err(DataError::file(file.name(), message));
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
            parts: Vec::new(),
        };
        let weights = weights.iter().copied().chain(std::iter::repeat(1.0));
        for (dataset, weight) in datasets.into_iter().zip(weights) {
            hash.update(&dataset.sha256);
            hash.update(weight.to_le_bytes());
            joined.parts.push(DatasetPart { rows: dataset.rows.len(), weight });
            joined.rows.append(dataset.rows);
            joined.report.join(dataset.report);
            joined.token_files.extend(dataset.token_files);
            joined.cache_problems.extend(dataset.cache_problems);
        }
        joined.sha256 = hex::encode(hash.finalize());
        joined.report.set_lengths(joined.lengths());
        joined
    }

    /// Returns the number of rows in an epoch.
    pub fn epoch_rows(&self) -> usize {
        match self.parts.as_slice() {
            [] => self.rows.len(),
            parts => parts.iter().map(DatasetPart::epoch_rows).sum(),
        }
    }

    /// Returns the number of tokens of each row, and how often an epoch has it.
    pub fn weighted_lengths(&self) -> impl Iterator<Item = (usize, f64)> {
        let weights = self.parts.iter().flat_map(|part| std::iter::repeat_n(part.weight, part.rows));
        self.lengths().into_iter().zip(weights.chain(std::iter::repeat(1.0)))
    }
}
