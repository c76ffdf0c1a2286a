//! Arrow IPC files of `tests/golden/arrow`.

use std::fs;

use lora_data::{Dataset, TokenRows};
use lora_spec::DataSpec;
use lora_test_kit::golden;

use crate::base_dir::{BaseDir, CHATML};

fn read(base: &BaseDir, name: &str) -> Result<TokenRows, String> {
    let path = base.dir.path().join(name);
    fs::copy(golden("arrow").join(name), &path).unwrap();
    let dataset = Dataset::read(&path.into(), &base.tokenizer(), &DataSpec::default());
    dataset.map(|dataset| dataset.rows).map_err(|error| base.error_text(error))
}

#[test]
fn every_file_has_the_rows_of_the_json_lines() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let expected = read(&base, "chats.jsonl").unwrap();
    assert_eq!(expected.len(), 4);
    for name in [
        "batches.arrow",
        "datasets.arrow",
        "dictionary.arrow",
        "large.arrow",
        "legacy-stream.arrow",
        "lz4-stream.arrow",
        "lz4.feather",
        "stream.arrow",
        "uncompressed.feather",
        "views.arrow",
        "zstd-stream.arrow",
        "zstd.feather",
    ] {
        assert_eq!(read(&base, name).as_ref(), Ok(&expected), "{name}");
    }
}

#[test]
fn errors_name_the_file_and_the_row_or_the_column() {
    let base = BaseDir::new("</s>", false);
    for (name, expected) in [
        ("no-rows.arrow", "has no rows"),
        (
            "missing-key.arrow",
            "row 2: a row of the format prompt/completion needs `completion`; the row's keys are `prompt`",
        ),
        ("bytes.arrow", "row 2: a byte string is not UTF-8"),
        ("late.arrow", "row 2: a timestamp is not in the years 1 to 9999"),
        ("twice.arrow", "has the column \"text\" twice"),
        (
            "interval.arrow",
            "its column \"span\" has the type Interval(MonthDayNano), which is not supported; remove the \
             column",
        ),
    ] {
        let error = read(&base, name).unwrap_err();
        let rest =
            error.strip_prefix(name).and_then(|rest| rest.trim_start_matches([':', ',']).strip_prefix(' '));
        assert_eq!(rest, Some(expected), "{error}");
    }
}
