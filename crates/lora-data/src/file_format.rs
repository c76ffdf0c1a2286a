//! The formats of dataset files: recognized by their names, and compared with their contents.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;

use lora_spec::SourceFile;

use crate::gzip_members::GzipMembers;
use crate::{DataError, RowList, arrow_rows};

/// What a dataset file's name may end with.
const EXTENSIONS: &str =
    ".jsonl, .ndjson, .json, .csv, .parquet, .arrow or .feather, and .gz or .zst after the first four";

/// The number of bytes at the start of a file that say what it is.
const HEAD_BYTES: u64 = 1024;

/// The format of a dataset file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileFormat {
    pub(crate) kind: FileKind,
    compression: Option<Compression>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    /// JSON Lines, or one JSON array.
    Json,
    /// Comma-separated values with a header.
    Csv,
    Parquet,
    /// An Arrow IPC file (Feather V2) or stream.
    Arrow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
}

impl FileFormat {
    /// Returns the format by the extensions of the file's name.
    pub(crate) fn from_name(name: &Path) -> Result<Self, DataError> {
        let unknown = || {
            DataError::file(
                name,
                format!("has an unknown extension; a dataset's name ends with {EXTENSIONS}"),
            )
        };
        let text = name.file_name().and_then(|name| name.to_str()).ok_or_else(unknown)?;
        let (stem, compression) = match text.rsplit_once('.') {
            Some((stem, "gz")) => (stem, Some(Compression::Gzip)),
            Some((stem, "zst")) => (stem, Some(Compression::Zstd)),
            _ => (text, None),
        };
        let kind = match stem.rsplit_once('.').map(|(_, extension)| extension) {
            Some("jsonl" | "ndjson" | "json") => FileKind::Json,
            Some("csv") => FileKind::Csv,
            Some("parquet") if compression.is_none() => FileKind::Parquet,
            Some("arrow" | "feather") if compression.is_none() => FileKind::Arrow,
            _ => return Err(unknown()),
        };
        Ok(Self { kind, compression })
    }

    /// Returns the contents of a file, decompressed.
    ///
    /// # Errors
    /// The contents are of another format than the name says.
    pub(crate) fn decoded<'a>(
        self,
        file: &SourceFile,
        raw: impl BufRead + 'a,
    ) -> Result<Box<dyn BufRead + 'a>, DataError> {
        let (head, raw) = with_head(raw).map_err(|error| DataError::read(file, error))?;
        let found = Contents::of(&head);
        let is_named = match found {
            Contents::Other => self.compression.is_none(),
            Contents::Compressed(compression) => self.compression == Some(compression),
            Contents::Parquet => self.kind == FileKind::Parquet,
            Contents::Arrow => self.kind == FileKind::Arrow,
            Contents::FeatherV1 | Contents::Utf16 | Contents::GitLfs => false,
        };
        if !is_named && !head.is_empty() {
            return Err(DataError::file(file.name(), found.problem(self)));
        }
        let decoded: Box<dyn BufRead> = match self.compression {
            None => return Ok(Box::new(raw)),
            Some(Compression::Gzip) => Box::new(BufReader::new(GzipMembers::new(raw))),
            Some(Compression::Zstd) => {
                let decoder =
                    zstd::Decoder::with_buffer(raw).map_err(|error| self.read_error(file, error))?;
                Box::new(BufReader::new(decoder))
            }
        };
        let (head, decoded) = with_head(decoded).map_err(|error| self.read_error(file, error))?;
        match Contents::of(&head) {
            Contents::Other => Ok(Box::new(decoded)),
            found => {
                let message = format!("its contents, decompressed: {}", found.problem(self));
                Err(DataError::file(file.name(), message))
            }
        }
    }

    /// The error of reading what [`Self::decoded`] has returned.
    pub(crate) fn read_error(self, file: &SourceFile, error: io::Error) -> DataError {
        match self.compression {
            None => DataError::read(file, error),
            Some(_) => DataError::file(file.name(), format!("cannot be decompressed: {error}")),
        }
    }
}

/// Returns the first bytes, and all bytes.
fn with_head(mut reader: impl BufRead) -> io::Result<(Vec<u8>, impl BufRead)> {
    let mut head = Vec::new();
    reader.by_ref().take(HEAD_BYTES).read_to_end(&mut head)?;
    Ok((head.clone(), Cursor::new(head).chain(reader)))
}

/// What the first bytes of a file say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    Compressed(Compression),
    Parquet,
    Arrow,
    FeatherV1,
    Utf16,
    GitLfs,
    Other,
}

impl Contents {
    fn of(bytes: &[u8]) -> Self {
        match bytes {
            [0x1F, 0x8B, ..] => Self::Compressed(Compression::Gzip),
            [0x28, 0xB5, 0x2F, 0xFD, ..] => Self::Compressed(Compression::Zstd),
            [b'P', b'A', b'R', b'1', ..] => Self::Parquet,
            _ if bytes.starts_with(arrow_rows::MAGIC) || bytes.starts_with(arrow_rows::CONTINUATION) => {
                Self::Arrow
            }
            [b'F', b'E', b'A', b'1', ..] => Self::FeatherV1,
            [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => Self::Utf16,
            // Text without a mark in front: every other byte of ASCII is zero.
            [0, 1..=255, 0, 1..=255, ..] | [1..=255, 0, 1..=255, 0, ..] => Self::Utf16,
            [0, 1..=255] | [1..=255, 0] => Self::Utf16,
            _ if lora_spec::is_git_lfs_pointer(bytes) => Self::GitLfs,
            _ => Self::Other,
        }
    }

    fn problem(self, named: FileFormat) -> String {
        match self {
            Self::Compressed(Compression::Gzip) => {
                "is compressed with gzip; its name must end with .gz".to_owned()
            }
            Self::Compressed(Compression::Zstd) => {
                "is compressed with Zstandard; its name must end with .zst".to_owned()
            }
            Self::Parquet => "is a Parquet file; its name must end with .parquet".to_owned(),
            Self::Arrow => "is an Arrow file; its name must end with .arrow or .feather".to_owned(),
            Self::FeatherV1 => "is a Feather V1 file; write Feather V2, which is the default of \
                                pyarrow.feather.write_feather"
                .to_owned(),
            Self::Utf16 => "is UTF-16 text; convert it to UTF-8".to_owned(),
            Self::GitLfs => lora_spec::GIT_LFS_POINTER.to_owned(),
            Self::Other if named.kind == FileKind::Parquet => "is not a Parquet file".to_owned(),
            Self::Other => "is not compressed as its name says".to_owned(),
        }
    }
}

impl FileKind {
    /// A name that stays the same in other versions.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Csv => "csv",
            Self::Parquet => "parquet",
            Self::Arrow => "arrow",
        }
    }

    /// The place of a row in errors.
    pub(crate) fn location(self, name: &Path, number: usize) -> String {
        match self {
            Self::Json | Self::Csv => format!("{}:{number}", name.display()),
            Self::Parquet | Self::Arrow => format!("{}, row {number}", name.display()),
        }
    }

    /// A list of rows in errors, with their lengths.
    pub(crate) fn row_list(self, rows: Vec<(usize, Option<usize>)>) -> RowList {
        let unit = match self {
            Self::Json | Self::Csv => "line",
            Self::Parquet | Self::Arrow => "row",
        };
        RowList { unit, total: rows.len(), first: rows.into_iter().take(RowList::MAX_SHOWN).collect() }
    }
}
