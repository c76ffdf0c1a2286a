//! Parquet files.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use lora_data::Dataset;
use lora_spec::DataSpec;
use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use crate::base_dir::{BaseDir, CHATML};

/// A column's values with their definition and repetition levels.
type Column<'a> = (&'a [&'a str], &'a [i16], &'a [i16]);

fn write(path: &Path, schema: &str, compression: Compression, columns: &[Column<'_>]) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for (values, definition, repetition) in columns {
        let values: Vec<ByteArray> = values.iter().map(|&value| ByteArray::from(value)).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, Some(definition), Some(repetition)).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

fn read(base: &BaseDir, path: &Path) -> Result<Vec<String>, String> {
    let tokenizer = base.tokenizer();
    match Dataset::read(&path.into(), &tokenizer, &DataSpec::default()) {
        Ok(dataset) => Ok(dataset.rows.iter().map(|row| tokenizer.marked_text(row).unwrap()).collect()),
        Err(error) => Err(base.error_text(error)),
    }
}

const TEXTS: &str =
    "message rows { optional binary text (STRING); optional binary prompt; optional binary completion; }";

#[test]
fn columns_become_keys_and_nulls_are_absent() {
    let base = BaseDir::new("</s>", false);
    let path = base.dir.path().join("data.parquet");
    for compression in
        [Compression::SNAPPY, Compression::ZSTD(ZstdLevel::default()), Compression::UNCOMPRESSED]
    {
        let columns: [Column<'_>; 3] =
            [(&["abé"], &[1, 0], &[0, 0]), (&["x"], &[0, 1], &[0, 0]), (&["y"], &[0, 1], &[0, 0])];
        write(&path, TEXTS, compression, &columns);
        assert_eq!(read(&base, &path).unwrap(), ["a⟦bé</s>⟧", "x⟦y</s>⟧"]);
    }
}

#[test]
fn messages_are_lists_of_structs() {
    let schema = "message rows { required group messages (LIST) { repeated group list {
        required group element { required binary role (STRING); required binary content (STRING);
        optional binary name (STRING); } } } }";
    let base = BaseDir::with_template(
        "<|im_end|>",
        &CHATML.replace("message.role", "message.role + (message.name or '')"),
    );
    let path = base.dir.path().join("data.parquet");
    let (define, repeat) = ([1; 4], [0, 1, 0, 1]);
    let columns: [Column<'_>; 3] = [
        (&["user", "assistant", "user", "assistant"], &define, &repeat),
        (&["a", "b", "c", "d"], &define, &repeat),
        (&[" x"], &[1, 1, 2, 1], &repeat),
    ];
    write(&path, schema, Compression::SNAPPY, &columns);
    let row = |name, user, assistant| {
        format!("<|im_start|>user{name}\n{user}<|im_end|>\n<|im_start|>assistant\n⟦{assistant}<|im_end|>⟧\n")
    };
    assert_eq!(read(&base, &path).unwrap(), [row("", "a", "b"), row(" x", "c", "d")]);
}

#[test]
fn a_bad_row_is_named_by_its_number() {
    let base = BaseDir::new("</s>", false);
    let path = base.dir.path().join("data.parquet");
    let columns: [Column<'_>; 3] =
        [(&["a"], &[1, 0], &[0, 0]), (&["x"], &[0, 1], &[0, 0]), (&[], &[0, 0], &[0, 0])];
    write(&path, TEXTS, Compression::SNAPPY, &columns);
    let error = read(&base, &path).unwrap_err();
    assert_eq!(
        error,
        "data.parquet, row 2: a row of the format prompt/completion needs `completion`; the row's keys are \
         `prompt`"
    );
}

#[test]
fn truncated_files_give_an_error_and_corrupt_files_do_not_crash() {
    let base = BaseDir::new("</s>", false);
    let path = base.dir.path().join("data.parquet");
    let texts: Vec<String> = (0..200).map(|i| format!("row {i}")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    write(
        &path,
        "message rows { optional binary text; }",
        Compression::SNAPPY,
        &[(&texts, &[1; 200], &[0; 200])],
    );
    assert_eq!(read(&base, &path).unwrap().len(), 200);
    let bytes = fs::read(&path).unwrap();
    for keep in [0, 3, 8, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..keep]).unwrap();
        let error = read(&base, &path).unwrap_err();
        assert!(error.starts_with("data.parquet: is not a readable Parquet file (truncated?): "), "{error}");
    }
    for at in 0..bytes.len() {
        let mut corrupt = bytes.clone();
        corrupt[at] ^= 0x5a;
        fs::write(&path, &corrupt).unwrap();
        // The text may change without an error, because pages have checksums only on request. The
        // reader must not crash.
        let _ = read(&base, &path);
    }
}
