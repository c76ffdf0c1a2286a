//! The errors of datasets and of a base's tokenizer.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use lora_spec::{FieldError, LongRows, SourceFile};

/// An error of a tokenizer, a chat template or a dataset.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A setting is invalid.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// A file cannot be read.
    #[error("{}: {source}", name.display())]
    Read {
        /// Name of the file.
        name: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A file is invalid as a whole.
    #[error("{}: {message}", name.display())]
    File {
        /// Name of the file.
        name: PathBuf,
        /// Why the file is invalid, and what would be right.
        message: String,
    },
    /// A row is invalid.
    #[error("{at}: {message}")]
    Row {
        /// `file:line`, `file:line:column`, or `file, row n` (from 1).
        at: String,
        /// Why the row is invalid, and what would be right.
        message: String,
    },
    /// The chat template cannot render the messages, or the base has no chat template.
    #[error("{0}")]
    ChatTemplate(String),
    /// The tokenizer refuses a text or token ids.
    #[error("tokenizer: {0}")]
    Tokenize(String),
    /// Rows have more than `max_length` tokens and [`LongRows::Error`] is set.
    #[error(
        "{}: {} longer than data.max_length {max_length}: {rows}; raise data.max_length, or set \
         data.long_rows to truncate or drop", name.display(), count(rows.total, "row is", "rows are")
    )]
    LongRows {
        /// Name of the dataset.
        name: PathBuf,
        /// Maximum number of tokens of a row.
        max_length: usize,
        /// The first of these rows, with their lengths.
        rows: RowList,
    },
    /// Every row has more than `max_length` tokens and [`LongRows::Drop`] is set.
    #[error(
        "{}: no row is left: all {total} have more than data.max_length {max_length} tokens, and \
         data.long_rows is drop; raise data.max_length", name.display()
    )]
    NothingLeft {
        /// Name of the dataset.
        name: PathBuf,
        /// Number of rows in the file.
        total: usize,
        /// Maximum number of tokens of a row.
        max_length: usize,
    },
    /// Rows have no target token.
    #[error(
        "{}: {} without target tokens: {rows}; {}", name.display(), count(rows.total, "row", "rows"),
        remedy(*long_rows)
    )]
    NoTargets {
        /// Name of the dataset.
        name: PathBuf,
        /// The first of these rows.
        rows: RowList,
        /// The handling of long rows. Truncation may have removed the targets.
        long_rows: LongRows,
    },
}

impl DataError {
    pub(crate) fn read(file: &SourceFile, source: io::Error) -> Self {
        Self::Read { name: file.name().to_owned(), source }
    }

    pub(crate) fn file(name: &Path, message: impl Into<String>) -> Self {
        Self::File { name: name.to_owned(), message: message.into() }
    }
}

/// The first rows of an error about several rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowList {
    /// `line` (JSONL) or `row` (Parquet, Arrow).
    pub unit: &'static str,
    /// Numbers of the first rows (from 1), with their lengths in tokens in errors about lengths.
    pub first: Vec<(usize, Option<usize>)>,
    /// Number of all rows.
    pub total: usize,
}

impl RowList {
    /// Maximum number of rows that an error names.
    pub const MAX_SHOWN: usize = 5;
}

impl fmt::Display for RowList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{} ", self.unit, if self.total == 1 { "" } else { "s" })?;
        for (i, (number, length)) in self.first.iter().enumerate() {
            let more = self.total - self.first.len();
            match i {
                0 => {}
                _ if more == 0 && i + 1 == self.first.len() => f.write_str(" and ")?,
                _ => f.write_str(", ")?,
            }
            write!(f, "{number}")?;
            if let Some(length) = length {
                write!(f, " ({length} tokens)")?;
            }
        }
        match self.total - self.first.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// A number of things.
pub(crate) fn count(total: usize, one: &str, many: &str) -> String {
    format!("{total} {}", if total == 1 { one } else { many })
}

fn remedy(long_rows: LongRows) -> &'static str {
    match long_rows {
        LongRows::Truncate => {
            "a row needs an assistant turn, a completion or a text within data.max_length tokens, and \
             truncation may have removed it; raise data.max_length, or set data.long_rows: drop"
        }
        LongRows::Error | LongRows::Drop => "a row needs an assistant turn, a completion or a text",
    }
}
