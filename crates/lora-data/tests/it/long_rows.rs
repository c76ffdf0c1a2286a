//! Rows longer than `max_length`, and rows without targets.

use lora_data::{DataError, Dataset};
use lora_spec::{DataSpec, LongRows};

use crate::base_dir::BaseDir;

const LINES: &str =
    "{\"text\": \"abc\"}\n\n{\"prompt\": \"abcdefgh\", \"completion\": \"ij\"}\n{\"text\": \"abcdefg\"}\n";

fn read(lines: &str, max_length: usize, long_rows: LongRows) -> (BaseDir, Result<Dataset, DataError>) {
    let base = BaseDir::new("</s>", false);
    let dataset = Dataset::read(
        &base.write("data.jsonl", lines).into(),
        &base.tokenizer(),
        &DataSpec { max_length, long_rows, ..DataSpec::default() },
    );
    (base, dataset)
}

fn error(lines: &str, max_length: usize, long_rows: LongRows) -> String {
    let (base, dataset) = read(lines, max_length, long_rows);
    base.error_text(dataset.unwrap_err())
}

#[test]
fn long_row_errors_name_line_and_length() {
    assert_eq!(
        error(LINES, 7, LongRows::Error),
        "data.jsonl: 2 rows are longer than data.max_length 7: lines 3 (11 tokens) and 4 (8 tokens); raise \
         data.max_length, or set data.long_rows to truncate or drop"
    );
    assert!(read(LINES, 11, LongRows::Error).1.is_ok());
}

#[test]
fn only_the_first_few_long_rows_are_named() {
    let error = error(&"{\"text\": \"abcdefg\"}\n".repeat(9), 7, LongRows::Error);
    assert!(error.contains("5 (8 tokens) and 4 more; raise"), "{error}");
}

#[test]
fn long_rows_are_truncated_at_the_end() {
    let (base, dataset) = read(LINES, 10, LongRows::Truncate);
    let dataset = dataset.unwrap();
    let marked = |i: usize| base.tokenizer().marked_text(dataset.rows.row(i)).unwrap();
    assert_eq!((marked(0), marked(1)), ("a⟦bc</s>⟧".into(), "abcdefgh⟦ij⟧".into()));
    assert_eq!((dataset.report.truncated, dataset.report.longest), (1, 10));
}

#[test]
fn long_rows_are_dropped() {
    let dataset = read(LINES, 7, LongRows::Drop).1.unwrap();
    assert_eq!(dataset.lengths(), [4]);
    assert_eq!((dataset.report.rows_read, dataset.report.rows_kept, dataset.report.dropped), (3, 1, 2));
}

#[test]
fn dropping_every_row_is_an_error() {
    assert_eq!(
        error(LINES, 3, LongRows::Drop),
        "data.jsonl: no row is left: all 3 have more than data.max_length 3 tokens, and data.long_rows \
         is drop; raise data.max_length"
    );
}

#[test]
fn a_row_whose_targets_are_truncated_is_an_error() {
    let error = error(LINES, 8, LongRows::Truncate);
    assert!(error.starts_with("data.jsonl: 1 row without target tokens: line 3; "), "{error}");
    assert!(error.contains("truncation may have removed it"), "{error}");
}

#[test]
fn rows_without_targets_are_named() {
    // An empty text has only its end token, which is the first token and therefore not a target.
    let lines = format!("{}{}", "{\"text\": \"a\"}\n", "{\"text\": \"\"}\n".repeat(8));
    let error = error(&lines, 8, LongRows::Error);
    assert!(
        error.starts_with(
            "data.jsonl: 8 rows without target tokens: lines 2, 3, 4, 5, 6 and 3 more; a row needs"
        ),
        "{error}"
    );
}
