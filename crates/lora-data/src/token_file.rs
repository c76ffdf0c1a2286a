//! Files of encoded rows, in the safetensors format (<https://huggingface.co/docs/safetensors>).
//!
//! | tensor | type | contents |
//! | --- | --- | --- |
//! | `ends` | U64 `[samples]` | where each sample ends in `words` |
//! | `numbers` | U64 `[samples]` | line or row of each sample in the dataset (from 1) |
//! | `words` | U32 `[tokens]` | `token << 1 \| trained` of each token |
//!
//! The metadata has the file's key, the statistics of the rows, and a hash. Numbers are
//! little endian.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::TokenRows;
use crate::encoded_rows::EncodedRows;

/// The largest header: the statistics name keys of rows, which are few.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// How many bytes are converted at a time.
const BLOCK_BYTES: usize = 1 << 16;

#[derive(Serialize, Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    metadata: Metadata,
    ends: Tensor,
    numbers: Tensor,
    words: Tensor,
}

#[derive(Serialize, Deserialize)]
struct Metadata {
    key: String,
    /// A [`DataReport`](crate::DataReport) as JSON.
    report: String,
    /// SHA-256 of the report and the tensors, in hex.
    sha256: String,
}

#[derive(Serialize, Deserialize, PartialEq)]
struct Tensor {
    dtype: String,
    shape: [u64; 1],
    data_offsets: [u64; 2],
}

impl Header {
    fn new(samples: u64, tokens: u64, metadata: Metadata) -> Option<Self> {
        let mut end = 0_u64;
        let mut tensor = |dtype: &str, width: u64, elements: u64| {
            let start = end;
            end = start.checked_add(elements.checked_mul(width)?)?;
            Some(Tensor { dtype: dtype.to_owned(), shape: [elements], data_offsets: [start, end] })
        };
        Some(Self {
            metadata,
            ends: tensor("U64", 8, samples)?,
            numbers: tensor("U64", 8, samples)?,
            words: tensor("U32", 4, tokens)?,
        })
    }
}

/// Writes the rows of `key`.
pub(crate) fn write(file: &mut File, key: &str, encoded: &EncodedRows) -> io::Result<()> {
    let (words, ends) = encoded.rows.parts();
    let report = serde_json::to_string(&encoded.report)?;
    let mut hash = Sha256::new();
    hash.update(&report);
    write_elements(HashWriter(&mut hash), ends, encoded, words)?;
    let metadata = Metadata { key: key.to_owned(), report, sha256: hex::encode(hash.finalize()) };
    let header = Header::new(ends.len() as u64, words.len() as u64, metadata).ok_or_else(invalid)?;
    let mut header = serde_json::to_string(&header)?;
    // The tensors begin at a multiple of 8 bytes.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    write_elements(file, ends, encoded, words)
}

fn write_elements(out: impl Write, ends: &[u64], encoded: &EncodedRows, words: &[u32]) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(BLOCK_BYTES, out);
    for numbers in [ends, &encoded.numbers] {
        numbers.iter().try_for_each(|number| out.write_all(&number.to_le_bytes()))?;
    }
    words.iter().try_for_each(|word| out.write_all(&word.to_le_bytes()))?;
    out.flush()
}

/// Hashes what is written.
struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads the rows of `key`.
///
/// # Errors
/// The file cannot be read, has other rows, is damaged or is not of this format.
pub(crate) fn read(path: &Path, key: &str) -> io::Result<EncodedRows> {
    // To open a named pipe would wait for its writer.
    if !path.metadata()?.is_file() {
        return Err(invalid());
    }
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(invalid());
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text)?;
    let header: Header = serde_json::from_slice(&text)?;
    let ([samples], [tokens]) = (header.ends.shape, header.words.shape);
    // The size is compared first, so a damaged header cannot ask for memory.
    let expected = Header::new(samples, tokens, header.metadata).ok_or_else(invalid)?;
    let is_whole = expected.words.data_offsets[1].checked_add(8 + length) == Some(size);
    let is_same = header.ends == expected.ends
        && header.numbers == expected.numbers
        && header.words == expected.words
        && expected.metadata.key == key;
    if !is_whole || !is_same {
        return Err(invalid());
    }
    let mut hash = Sha256::new();
    hash.update(&expected.metadata.report);
    let ends = elements((&mut file, &mut hash), samples, u64::from_le_bytes)?;
    let numbers = elements((&mut file, &mut hash), samples, u64::from_le_bytes)?;
    let words = elements((&mut file, &mut hash), tokens, u32::from_le_bytes)?;
    if hex::encode(hash.finalize()) != expected.metadata.sha256 {
        return Err(invalid());
    }
    let report = serde_json::from_str(&expected.metadata.report)?;
    let rows = TokenRows::from_parts(words, ends).ok_or_else(invalid)?;
    Ok(EncodedRows { rows, numbers, report })
}

/// Reads and hashes numbers of `N` bytes.
fn elements<T, const N: usize>(
    (file, hash): (&mut File, &mut Sha256),
    count: u64,
    of: fn([u8; N]) -> T,
) -> io::Result<Vec<T>> {
    let mut left = usize::try_from(count).map_err(|_| invalid())?;
    let mut all = Vec::with_capacity(left);
    let mut block = vec![[0; N]; (BLOCK_BYTES / N).min(left)];
    while left > 0 {
        let block = &mut block[..left.min(BLOCK_BYTES / N)];
        file.read_exact(block.as_flattened_mut())?;
        hash.update(block.as_flattened());
        all.extend(block.iter().copied().map(of));
        left -= block.len();
    }
    Ok(all)
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "is not a file of these rows")
}
