//! What can be wrong with a dataset or a base's tokenizer.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use lora_spec::LongRows;

/// Why a tokenizer, a chat template or a dataset cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file as a whole is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// One row is wrong.
    #[error("{at}: {message}")]
    Row {
        /// `file:line`, `file:line:column`, or `file, row n` (from 1).
        at: String,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// The chat template cannot render the messages, or there is none.
    #[error("{0}")]
    ChatTemplate(String),
    /// The tokenizer refuses a text or token ids.
    #[error("tokenizer: {0}")]
    Tokenize(String),
    /// Rows have more than `max_length` tokens and [`LongRows::Error`] is set.
    #[error(
        "{}: {} longer than data.max_length {max_length}: {rows}; raise data.max_length, or set data.long_rows to \
         truncate or drop", path.display(), count(rows.total, "row is", "rows are")
    )]
    LongRows {
        /// The dataset.
        path: PathBuf,
        /// The most tokens a row may have.
        max_length: usize,
        /// The first of them, with their lengths.
        rows: RowList,
    },
    /// Every row has more than `max_length` tokens and [`LongRows::Drop`] is set.
    #[error(
        "{}: no row is left: all {total} have more than data.max_length {max_length} tokens and data.long_rows is drop",
        path.display()
    )]
    NothingLeft {
        /// The dataset.
        path: PathBuf,
        /// Rows in the file.
        total: usize,
        /// The most tokens a row may have.
        max_length: usize,
    },
    /// Rows hold no token that the loss would count.
    #[error(
        "{}: {} without target tokens: {rows}; {}", path.display(), count(rows.total, "row", "rows"),
        remedy(*long_rows)
    )]
    NoTargets {
        /// The dataset.
        path: PathBuf,
        /// The first of them.
        rows: RowList,
        /// What was done to long rows: truncation may have cut the targets off.
        long_rows: LongRows,
    },
}

impl DataError {
    pub(crate) fn file(path: &Path, message: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), message: message.into() }
    }
}

/// The first few of the rows that an error is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowList {
    /// `line` (JSONL) or `row` (Parquet).
    pub unit: &'static str,
    /// Their numbers (from 1) and, where it matters, lengths in tokens.
    pub first: Vec<(usize, Option<usize>)>,
    /// How many there are in all.
    pub total: usize,
}

impl RowList {
    /// At most this many rows are named.
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

fn count(total: usize, one: &str, many: &str) -> String {
    format!("{total} {}", if total == 1 { one } else { many })
}

fn remedy(long_rows: LongRows) -> &'static str {
    match long_rows {
        LongRows::Truncate => {
            "a row needs an assistant turn, a completion or a text of its own within data.max_length tokens (truncation \
             may have cut it off)"
        }
        LongRows::Error | LongRows::Drop => {
            "a row needs an assistant turn, a completion or a text of its own"
        }
    }
}
