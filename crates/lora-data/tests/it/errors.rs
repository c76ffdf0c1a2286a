//! Errors for invalid rows and files: each names the location and what would be right.

use std::fs;

use lora_data::{DataError, Dataset, check_data_file};
use lora_spec::DataSpec;
use serde_json::json;

use crate::base_dir::{BaseDir, CHATML};

const GOOD: &str = "{\"text\": \"abc\"}\n";

#[track_caller]
fn assert_error(line: &str, expected: &str) {
    let error = BaseDir::with_template("<|im_end|>", CHATML).error(&format!("{GOOD}\n{line}\n{GOOD}{{"));
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn invalid_json_errors_name_file_line_and_column() {
    assert_error("{\"text\": \"a\" \"b\"}", "data.jsonl:3:14: invalid JSON: expected `,` or `}`");
    assert_error("{\"text\": \"a", "data.jsonl:3:11: invalid JSON: EOF while parsing a string");
    assert_error("{\"text\": \"a\"} x", "data.jsonl:3:15: invalid JSON: trailing characters");
    assert_error("null", "data.jsonl:3: the row is null; it must be a JSON object");
    assert_error("[1]", "data.jsonl:3: the row is a list; it must be a JSON object");
}

#[test]
fn integers_that_do_not_fit_64_bits_are_named() {
    let line = |number: &str| format!("{{\"text\": \"a\", \"n\": {number}}}");
    assert_error(
        &line("123456789012345678901234567890"),
        "data.jsonl:3: an integer of 30 digits is not supported; write it as a string",
    );
    let base = BaseDir::new("</s>", false);
    for number in
        ["18446744073709551615", "0.12345678901234567890123", "1e-30", "\"12345678901234567890123\""]
    {
        assert!(base.read_text(&line(number)).is_ok(), "{number}");
    }
}

#[test]
fn non_utf8_text_is_invalid_json() {
    let base = BaseDir::new("</s>", false);
    let path = base.dir.path().join("data.jsonl");
    fs::write(&path, b"{\"text\": \"a\xff\"}").unwrap();
    let error = Dataset::read(&path.as_path().into(), &base.tokenizer(), &DataSpec::default()).unwrap_err();
    assert!(base.error_text(error).starts_with("data.jsonl:1: is not UTF-8; convert the file"));
}

#[test]
fn an_unrecognized_row_lists_the_known_formats() {
    assert_error(
        "{\"question\": \"a\", \"answer\": \"b\"}",
        "data.jsonl:3: not a row of a known format: it needs `messages`; `conversations`; `prompt` and \
         `completion`; `text`; or `instruction` and `output`; its keys are `question`, `answer`",
    );
    assert_error("{}", "data.jsonl:3: not a row of a known format");
}

#[test]
fn a_row_of_preferences_is_named() {
    assert_error(
        "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}",
        "data.jsonl:3: a row of preferences (`chosen`, `rejected`), which are not trained; for supervised",
    );
}

#[test]
fn a_missing_key_is_named() {
    assert_error(
        "{\"prompt\": \"a\"}",
        "data.jsonl:3: a row of the format prompt/completion needs `completion`",
    );
    assert_error(
        "{\"output\": \"a\"}",
        "data.jsonl:3: a row of the format instruction/output needs `instruction`",
    );
}

#[test]
fn wrong_types_are_named() {
    assert_error("{\"text\": 3}", "data.jsonl:3: `text` is a number; it must be a string");
    assert_error(
        "{\"prompt\": \"a\", \"completion\": []}",
        "data.jsonl:3: `prompt` is a string and `completion` is a list; both must be",
    );
    assert_error(
        "{\"instruction\": \"a\", \"input\": 1, \"output\": \"b\"}",
        "data.jsonl:3: `input` is a number; it must be a string",
    );
    assert_error(
        "{\"messages\": \"a\"}",
        "data.jsonl:3: `messages` is a string; it must be a list of messages",
    );
    assert_error("{\"messages\": []}", "data.jsonl:3: `messages` is an empty list");
    assert_error("{\"messages\": [1]}", "data.jsonl:3: messages[0] is a number; a message is an object");
    let messages = |message| json!({"messages": [{"role": "user", "content": "a"}, message]}).to_string();
    assert_error(&messages(json!({"content": "a"})), "data.jsonl:3: messages[1] has no `role`");
    assert_error(
        &messages(json!({"role": 1})),
        "data.jsonl:3: messages[1].role is a number; it must be a string",
    );
    assert_error(&messages(json!({"role": "user"})), "data.jsonl:3: messages[1] has neither `content` nor");
    for calls in [json!(null), json!([])] {
        assert_error(
            &messages(json!({"role": "assistant", "content": null, "tool_calls": calls})),
            "data.jsonl:3: messages[1] has neither `content` nor `tool_calls`",
        );
    }
    assert_error(
        &messages(json!({"role": "user", "content": 3})),
        "data.jsonl:3: messages[1].content is a number; it must be a string, or a list of text parts",
    );
    assert_error(
        &messages(json!({"role": "user", "content": [{"type": "image_url", "image_url": "a"}]})),
        "data.jsonl:3: messages[1].content[0] has the type \"image_url\"; only text can be trained",
    );
    assert_error(
        &messages(json!({"from": "narrator", "value": "a"})),
        "data.jsonl:3: messages[1].from is \"narrator\"; supported: human, gpt, system, tool",
    );
    assert_error(
        &messages(json!({"role": "assistant", "content": "a", "weight": 0.5})),
        "data.jsonl:3: messages[1].weight is 0.5; it must be 0 or 1",
    );
    assert_error(
        &messages(json!({"role": "assistant", "content": "a", "train": "no"})),
        "data.jsonl:3: messages[1].train is \"no\"; it must be true or false",
    );
    assert_error(
        &messages(json!({"role": "assistant", "content": "a", "weight": 0, "train": true})),
        "data.jsonl:3: messages[1] has `weight` and `train`, which contradict each other",
    );
    assert_error(
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": \"f\"}",
        "data.jsonl:3: `tools` is a string that is not a JSON list",
    );
}

#[test]
fn an_unknown_role_is_refused() {
    assert_error(
        &json!({"messages": [{"role": "asistant", "content": "a"}]}).to_string(),
        "data.jsonl:3: unknown role \"asistant\"; supported: system, developer, user, assistant, tool",
    );
}

#[test]
fn the_first_bad_row_is_the_one_reported() {
    let base = BaseDir::new("</s>", false);
    let lines = format!("{}{}", GOOD.repeat(100), "{\"text\": 1}\n".repeat(100));
    assert!(base.error(&lines).starts_with("data.jsonl:101: "));
}

#[test]
fn a_file_without_rows_is_refused() {
    assert_eq!(BaseDir::new("</s>", false).error(""), "data.jsonl: has no rows");
    assert_eq!(BaseDir::new("</s>", false).error("\n \r\n"), "data.jsonl: has no rows");
}

#[test]
fn a_row_of_a_json_array_is_named_by_its_line() {
    let base = BaseDir::new("</s>", false);
    let error = base.error("\n[\n{\"text\": \"a\"},\n\n {\"txt\":\n 1}]\n");
    assert!(error.starts_with("data.jsonl:5: not a row of a known format"), "{error}");
    let error = base.error("[\n{\"text\": \"a\"}\n{\"text\": \"a\"}]");
    assert!(error.starts_with("data.jsonl:3:1: invalid JSON: expected `,` or `]`"), "{error}");
}

#[test]
fn a_file_of_another_format_than_its_name_says_what_it_is() {
    let base = BaseDir::new("</s>", false);
    let error = |name: &str, contents: &[u8]| {
        let path = base.dir.path().join(name);
        fs::write(&path, contents).unwrap();
        base.error_text(Dataset::read(&path.into(), &base.tokenizer(), &DataSpec::default()).unwrap_err())
    };
    let utf16: Vec<u8> = "\u{FEFF}{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    for (name, contents, expected) in [
        ("a.jsonl", &b"\x1F\x8B\x08"[..], "a.jsonl: is compressed with gzip; its name must end with .gz"),
        ("a.json", b"\x28\xB5\x2F\xFD", "a.json: is compressed with Zstandard; its name must end with .zst"),
        ("a.csv", b"PAR1", "a.csv: is a Parquet file; its name must end with .parquet"),
        ("a.jsonl", b"ARROW1", "a.jsonl: is an Arrow file; its name must end with .arrow or .feather"),
        ("a.csv", b"\xFF\xFF\xFF\xFF\x10", "a.csv: is an Arrow file; its name must end with .arrow"),
        ("a.arrow", b"PAR1", "a.arrow: is a Parquet file; its name must end with .parquet"),
        ("a.feather", b"FEA1", "a.feather: is a Feather V1 file; write Feather V2"),
        ("a.arrow", pointer, "a.arrow: is a Git LFS pointer"),
        ("a.arrow", b"", "a.arrow: is not a readable Arrow file (truncated?): it is empty"),
        ("a.arrow", b"{\"text\": \"a\"}", "a.arrow: is not a readable Arrow file (truncated?): it ends"),
        ("a.arrow.gz", b"", "a.arrow.gz: has an unknown extension"),
        ("a.jsonl", &utf16, "a.jsonl: is UTF-16 text; convert it to UTF-8"),
        ("a.jsonl", &utf16[2..], "a.jsonl: is UTF-16 text; convert it to UTF-8"),
        ("a.jsonl", b"\n\0 \0{\0}\0", "a.jsonl: is UTF-16 text; convert it to UTF-8"),
        ("a.csv", b"\0t\0e\0x\0t\0\n\0a", "a.csv: is UTF-16 text; convert it to UTF-8"),
        ("a.jsonl", b"\0{", "a.jsonl: is UTF-16 text; convert it to UTF-8"),
        ("a.jsonl.gz", b"\0\0\0\0", "a.jsonl.gz: is not compressed as its name says"),
        ("a.jsonl", pointer, "a.jsonl: is a Git LFS pointer"),
        ("a.parquet", pointer, "a.parquet: is a Git LFS pointer"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz: is not compressed as its name says"),
        ("a.jsonl.gz", b"\x1F\x8B\x08", "a.jsonl.gz: cannot be decompressed: "),
        ("a.csv", b"text\na\nb,c\n", "a.csv:3: has 2 values; the header has 1 names"),
        ("a.csv", b"text\n\xff\n", "a.csv:2: is not UTF-8"),
        ("a.csv", b"text,text\na,b\n", "a.csv: its header has the name \"text\" twice"),
        ("a.csv", b"text\n\"a\nb\n", "a.csv:2: a quote that begins here is not closed"),
    ] {
        let error = error(name, contents);
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn unsupported_and_missing_files_are_named() {
    let base = BaseDir::new("</s>", false);
    let read = |path: &std::path::Path| {
        Dataset::read(&path.into(), &base.tokenizer(), &DataSpec::default()).unwrap_err()
    };
    let error = base.error_text(read(&base.write("data.txt", "a")));
    assert!(error.starts_with("data.txt: has an unknown extension; a dataset's name ends with .jsonl"));
    assert!(matches!(read(&base.dir.path().join("none.jsonl")), DataError::Read { .. }));
}

#[test]
fn text_rows_require_an_eos_token() {
    let base = BaseDir::new("</s>", false);
    base.config(json!({}));
    let error = base.error(GOOD);
    assert!(error.starts_with("data.jsonl:1: tokenizer: the base has no end-of-sequence token"), "{error}");
}

#[test]
fn a_data_file_is_checked_before_it_is_read() {
    let base = BaseDir::new("</s>", false);
    let path = |name: &str| base.dir.path().join(name);
    let check = |name: &str| {
        let checked = check_data_file("data.train", &path(name).into());
        checked.map_err(|error| error.to_string().replace(&format!("{}/", base.dir.path().display()), ""))
    };
    base.write("a.json", "");
    assert_eq!(check("a.json"), Ok(()));
    base.write("a.xlsx", "");
    assert_eq!(
        check("a.xlsx").unwrap_err(),
        "data.train: a.xlsx: has an unknown extension; a dataset's name ends with .jsonl, .ndjson, .json, \
         .csv, .parquet, .arrow or .feather, and .gz or .zst after the first four"
    );
    assert_eq!(check("b.jsonl").unwrap_err(), "data.train: the file b.jsonl does not exist");
    std::fs::create_dir(path("d.jsonl")).unwrap();
    assert_eq!(check("d.jsonl").unwrap_err(), "data.train: d.jsonl is not a file");
    let error = check("a.json/x.jsonl").unwrap_err();
    assert!(error.starts_with("data.train: a.json/x.jsonl: Not a directory"), "{error}");
}

#[test]
fn a_quote_that_is_not_closed_is_named_by_its_line() {
    let base = BaseDir::new("</s>", false);
    for (text, line) in [
        ("text\n\"a\nb\n", 2),
        ("text,b\n\"a\"\"\",c\nx,\"y\nz,w\n\"p\nq\",r\n\"s\",t\n", 3),
        ("\"text\"\n\"a\"\n\"b", 3),
    ] {
        let path = base.write("a.csv", text);
        let error = Dataset::read(&path.into(), &base.tokenizer(), &DataSpec::default()).unwrap_err();
        let expected = format!("a.csv:{line}: a quote that begins here is not closed");
        assert_eq!(base.error_text(error), expected, "{text}");
    }
}

#[test]
fn an_object_of_several_lines_is_explained() {
    let base = BaseDir::new("</s>", false);
    let error = base.error("{\n  \"text\": \"a\"\n}\n");
    assert!(error.ends_with("each line must be a whole object, or the file one JSON array"), "{error}");
}
