//! Tokenizes dataset files of one row with several bases, for `tests/oracle/chat_pairs.py`.
//!
//! ```sh
//! cargo run -p lora-data --example tokenize_rows -- ROOT
//! ```
//!
//! `ROOT/bases/*` are directories with a tokenizer, `ROOT/rows/*` the files. Prints a JSON object
//! for each base and file: their names, and `tokens` and `trained` of the row, or the `error`.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use lora_data::{DataError, Dataset, Row, Tokenizer};
use lora_spec::DataSpec;
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(std::env::args().nth(1).ok_or("usage: tokenize_rows ROOT")?);
    for base in entries(&root.join("bases"))? {
        for file in entries(&root.join("rows"))? {
            let result = match tokenize(&base, &file) {
                Ok(row) => json!({"tokens": row.tokens, "trained": row.trained}),
                Err(error) => json!({"error": error.to_string()}),
            };
            let name = |path: &Path| path.file_stem().map(|name| name.to_string_lossy().into_owned());
            println!("{}", json!({"base": name(&base), "file": name(&file), "result": result}));
        }
    }
    Ok(())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut paths =
        fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, std::io::Error>>()?;
    paths.sort();
    Ok(paths)
}

fn tokenize(base: &Path, file: &Path) -> Result<Row, DataError> {
    let tokenizer = Tokenizer::load(&base.into())?;
    let dataset =
        Dataset::read(&file.into(), &tokenizer, &DataSpec { max_length: usize::MAX, ..DataSpec::default() })?;
    match dataset.rows.len() {
        0 => Err(DataError::ChatTemplate("the file has no row".into())),
        rows => {
            let row = dataset.rows.row(rows - 1);
            Ok(Row { tokens: row.tokens().collect(), trained: row.trained().collect() })
        }
    }
}
