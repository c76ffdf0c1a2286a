//! Files of `tests/golden/arrow`, made by pyarrow, and corrupt copies of them.

use std::fs;

use arrow_array::RecordBatchOptions;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field, Schema};
use lora_test_kit::golden;
use serde_json::{Map, Value as Json, json};

use super::*;
use crate::parquet_rows;

fn bytes(name: &str) -> Vec<u8> {
    fs::read(golden("arrow").join(name)).unwrap()
}

fn objects(rows: Result<RawRows, DataError>) -> Result<Vec<NumberedObject>, String> {
    let object = |row| match row {
        Ok((number, RawRow::Object(row))) => Ok((number, row)),
        Ok((number, RawRow::Text(_))) => panic!("row {number} is a text"),
        Err(error) => Err(error),
    };
    rows.and_then(|rows| rows.rows.map(object).collect()).map_err(|error: DataError| error.to_string())
}

fn read(bytes: Vec<u8>) -> Result<Vec<NumberedObject>, String> {
    objects(read_rows(Path::new("x.arrow"), bytes.into()))
}

#[test]
fn each_type_has_the_values_that_it_has_in_parquet() {
    let rows = read(bytes("types.arrow")).unwrap();
    let parquet = parquet_rows::read_rows(Path::new("x.parquet"), bytes("types.parquet").into());
    let parquet = objects(parquet).unwrap();
    assert_eq!((rows.len(), parquet.len()), (2, 2));
    let only_in_arrow = ["string_view", "binary_view", "list_view", "large_list_view"];
    for ((number, row), expected) in rows.iter().zip(parquet) {
        let common = row.clone().into_iter().filter(|(key, _)| !only_in_arrow.contains(&key.as_str()));
        assert_eq!((*number, common.collect::<Map<_, _>>()), expected);
    }
    let texts = json!(["aé", "aé", [1, 2], [1, 2]]);
    assert_eq!(json!(only_in_arrow.map(|key| rows[0].1[key].clone())), texts);
    // Nulls are absent, except in lists and maps.
    let row = Json::Object(rows[0].1.clone());
    assert_eq!(
        (&row["list"], &row["structs"]),
        (&json!(["a", null]), &json!([{"x": 1, "y": "a"}, {"y": "b"}]))
    );
    assert_eq!((&row["map"], &row["numbers"]), (&json!({"a": 1, "b": null}), &json!({"1": "a"})));
    for absent in ["null", "struct", "large_list"] {
        assert!(!rows[1].1.contains_key(absent), "{absent}");
    }
    let row = Json::Object(rows[1].1.clone());
    assert_eq!((&row["u64"], &row["f16"], &row["whole"]), (&json!(1), &json!(-0.25), &json!("-70")));
    assert_eq!(
        (&row["date64"], &row["utc_s"]),
        (&json!("1901-02-03"), &json!("1901-02-03 00:00:00.000 +00:00"))
    );
}

#[test]
fn a_compressed_stream_of_a_slice_has_the_rows_of_the_file() {
    assert_eq!(read(bytes("types-stream.arrow")), read(bytes("types.arrow")));
}

#[test]
fn a_record_batch_is_read_at_a_time() {
    for name in ["batches.arrow", "stream.arrow"] {
        let batches = ArrowReader::new(Path::new(name), bytes(name).into()).unwrap();
        let numbers = batches.map(|rows| rows.unwrap().into_iter().map(|(number, _)| number).collect());
        let numbers: Vec<Vec<usize>> = numbers.collect();
        assert_eq!(numbers.concat(), [1, 2, 3, 4]);
        assert!(numbers.len() >= 2, "{numbers:?}");
    }
}

#[test]
fn buffers_need_no_alignment() {
    for name in ["types.arrow", "batches.arrow", "legacy-stream.arrow"] {
        let moved = Bytes::from([&[0], &bytes(name)[..]].concat()).slice(1..);
        let rows = objects(read_rows(Path::new("x.arrow"), moved));
        assert_eq!(rows, read(bytes(name)), "{name}");
    }
}

#[test]
fn a_dictionary_grows_in_a_stream() {
    let rows = read(bytes("delta-stream.arrow")).unwrap();
    let texts: Vec<&str> = rows.iter().map(|(_, row)| row["text"].as_str().unwrap()).collect();
    let chats = bytes("chats.jsonl");
    let chats = chats.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let chats: Vec<Json> = chats.map(|line| serde_json::from_slice(line).unwrap()).collect();
    let turns = chats.iter().flat_map(|chat| chat["messages"].as_array().unwrap());
    assert_eq!(texts, turns.map(|turn| turn["content"].as_str().unwrap()).collect::<Vec<_>>());
}

#[test]
fn a_batch_without_bytes_for_its_rows_is_an_error() {
    let rows_of = |count| {
        let options = RecordBatchOptions::new().with_row_count(Some(count));
        let batch = RecordBatch::try_new_with_options(Schema::empty().into(), Vec::new(), &options).unwrap();
        let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        read(writer.into_inner().unwrap())
    };
    assert_eq!(rows_of(3).unwrap().len(), 3);
    let error = rows_of(1 << 40).unwrap_err();
    assert!(error.ends_with("a batch has 1099511627776 rows without values"), "{error}");
}

#[test]
fn an_unsupported_type_is_found_within_others() {
    let decimal = DataType::Decimal128(5, -2);
    let list = DataType::List(Arc::new(Field::new("item", decimal, true)));
    let column = Field::new("column", DataType::Struct(vec![Field::new("list", list, true)].into()), true);
    let error = check_type(&column).unwrap_err();
    let expected = "its column \"column\" has the type Decimal128(5, -2), which is not supported";
    assert!(error.starts_with(expected), "{error}");
}

/// Files of each format, compression and layout.
const FUZZED: [&str; 9] = [
    "batches.arrow",
    "stream.arrow",
    "legacy-stream.arrow",
    "lz4.feather",
    "zstd-stream.arrow",
    "large.arrow",
    "views.arrow",
    "dictionary.arrow",
    "delta-stream.arrow",
];

#[test]
fn truncated_files_are_errors() {
    for name in FUZZED {
        let whole = bytes(name);
        assert!(read(whole.clone()).is_ok(), "{name}");
        for keep in 0..whole.len() {
            let error = read(whole[..keep].to_vec()).unwrap_err();
            let start = "x.arrow: is not a readable Arrow file (truncated?): ";
            assert!(error.starts_with(start), "{name}, {keep}: {error}");
        }
    }
    let error = read(bytes("stream.arrow")[..2000].to_vec()).unwrap_err();
    assert!(error.ends_with("it ends within a message"), "{error}");
    let stream = bytes("stream.arrow");
    let error = read(stream[..stream.len() - 8].to_vec()).unwrap_err();
    assert!(error.ends_with("it is truncated, or its writer was not closed"), "{error}");
}

/// A text may change without an error, because the format has no checksums.
#[test]
fn corrupt_files_do_not_crash() {
    let check = |name: &str, at: usize, corrupt: Vec<u8>| {
        if let Err(error) = read(corrupt) {
            let kinds =
                ["x.arrow: is not a readable", "x.arrow, row ", "x.arrow: its column", "x.arrow: has the"];
            let is_known = kinds.iter().any(|kind| error.starts_with(kind)) && error.lines().count() == 1;
            assert!(is_known, "{name}, byte {at}: {error}");
        }
    };
    for name in FUZZED.into_iter().chain(["types.arrow"]) {
        let whole = bytes(name);
        for at in 0..whole.len() {
            for bits in [0x5A, 0xFF] {
                let mut corrupt = whole.clone();
                corrupt[at] ^= bits;
                check(name, at, corrupt);
            }
        }
        // Lengths and offsets of 4 and 8 bytes.
        for at in (0..whole.len() - 8).step_by(4) {
            for word in [0, i32::MAX, i32::MIN] {
                let mut corrupt = whole.clone();
                corrupt[at..at + 4].copy_from_slice(&word.to_le_bytes());
                check(name, at, corrupt);
            }
            for word in [1 << 40, i64::MAX, i64::MIN] {
                let mut corrupt = whole.clone();
                corrupt[at..at + 8].copy_from_slice(&word.to_le_bytes());
                check(name, at, corrupt);
            }
        }
    }
}

#[test]
fn a_second_stream_is_an_error() {
    let stream = bytes("stream.arrow");
    let error = read([stream.clone(), stream.clone()].concat()).unwrap_err();
    assert!(error.contains("it goes on after the marker of its end"), "{error}");
    // Padding is not a second stream.
    let padded = [stream.clone(), vec![0; 12]].concat();
    assert_eq!(read(padded), read(stream));
}
