//! Compares the page on the job file with `lora-spec`: its tables list every key with its type, its
//! default and its limits.

use std::collections::BTreeMap;
use std::path::Path;

use lora_spec::{JobFile, JobSpec};
use serde_json::{Value, json};

use crate::files;
use crate::markdown::{Document, Located};

const PAGE: &str = "docs/job-file.md";
const COLUMNS: [&str; 6] = ["key", "type", "default", "meaning", "values", "elsewhere"];
const REQUIRED: &str = "required";

/// A row of the tables.
struct KeyRow<'a> {
    key: &'a str,
    kind: &'a str,
    default: &'a str,
    values: &'a str,
}

fn problems(page: &Document) -> Vec<String> {
    let mut problems = Vec::new();
    let defaults = leaves(&serde_json::to_value(JobSpec::default()).unwrap());
    let rows: Vec<KeyRow> = rows(page).collect();
    for key in defaults.keys() {
        let count = rows.iter().filter(|row| row.key == key).count();
        if count != 1 {
            problems.push(format!("{key} has {count} rows"));
        }
    }
    for row in &rows {
        match defaults.get(row.key) {
            Some(default) => problems.extend(check_row(row, default)),
            None => problems.push(format!("key {} does not exist", row.key)),
        }
    }
    let files = page.blocks.iter().filter(|block| block.language == "yaml");
    let complete = files.filter_map(|block| check_file(&block.text, &defaults));
    problems.extend(complete);
    problems.into_iter().map(|problem| format!("{PAGE}: {problem}")).collect()
}

/// The rows of all tables of keys.
fn rows(page: &Document) -> impl Iterator<Item = KeyRow<'_>> {
    page.rows.iter().filter(|row| row.len() == COLUMNS.len() && row[..] != COLUMNS).map(|row| KeyRow {
        key: row[0].trim_matches('`'),
        kind: &row[1],
        default: &row[2],
        values: &row[4],
    })
}

fn check_row(row: &KeyRow, default: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    let mut check = |is_right: bool, what: String| {
        if !is_right {
            problems.push(format!("{}: {what}", row.key));
        }
    };
    if row.default == REQUIRED {
        check(*default == json!(""), format!("is not required; its default is {default}"));
    } else {
        let written: Value = serde_saphyr::from_str(row.default.trim_matches('`')).unwrap();
        check(is_equal(&written, default), format!("the default is {default}, not {written}"));
    }
    let has_kind = |kind: &str| match kind {
        "boolean" => default.is_boolean(),
        "integer" => default.is_u64(),
        "number" => default.is_number(),
        "path" | "string" => default.is_string(),
        "mapping" => default.is_object(),
        "list" => default.is_array(),
        _ => false,
    };
    check(default.is_null() || row.kind.split(" or ").any(has_kind), format!("{} is not its type", row.kind));

    for clause in row.values.split(';').map(|clause| clause.trim().trim_end_matches(", or `null`")) {
        if let Some(words) = clause.strip_prefix("one of ") {
            for Located { text: word, .. } in &Document::parse(PAGE, words).code {
                let error = error_for(row.key, serde_saphyr::from_str(word).unwrap());
                check(error.is_none(), format!("{word} is refused: {}", error.unwrap_or_default()));
            }
        }
        let (right, wrong) = bounds(clause);
        for value in right {
            let error = error_for(row.key, value.clone());
            check(error.is_none(), format!("{value} is refused: {}", error.unwrap_or_default()));
        }
        for value in wrong {
            check(error_for(row.key, value.clone()).is_some(), format!("{value} is accepted"));
        }
    }
    problems
}

/// Values that a clause such as `0 to below 1` allows, and values that it excludes.
fn bounds(clause: &str) -> (Vec<Value>, Vec<Value>) {
    let words: Vec<&str> = clause.split(' ').collect();
    let number = |word: &str| word.parse::<f64>().ok();
    let value = |x: f64| if x.fract() == 0.0 { json!(x as i64) } else { json!(x) };
    match words[..] {
        ["above", low] => number(low).map(|low| (vec![], vec![value(low)])),
        ["at", "least", low] => number(low).map(|low| (vec![value(low)], vec![value(low - 1.0)])),
        ["at", "most", high] => number(high).map(|high| (vec![value(high)], vec![value(high * 2.0)])),
        [low, "or", "more"] => number(low).map(|low| (vec![value(low)], vec![value(low - 1.0)])),
        [low, "to", "below", high] => number(low)
            .zip(number(high))
            .map(|(low, high)| (vec![value(low)], vec![value(low - 1.0), value(high)])),
        [low, "to", high] => number(low)
            .zip(number(high))
            .map(|(low, high)| (vec![value(low), value(high)], vec![value(low - 1.0), value(high + 1.0)])),
        _ => None,
    }
    .unwrap_or_default()
}

/// The error of `lora-spec` for a value of a key in an otherwise valid job. Errors about other keys
/// are ignored.
fn error_for(key: &str, value: Value) -> Option<String> {
    let mut job = json!({
        "name": "a",
        "model": {"base": "b", "quantization": "nf4"},
        "adapter": {},
        "data": {"train": "t", "eval": "e"},
        "training": {},
        "workers": {},
    });
    if key == "adapter.loftq_iter" {
        job["adapter"]["init_lora_weights"] = json!("loftq");
    }
    match key.split_once('.') {
        Some((section, name)) => job[section][name] = value,
        None => job[key] = value,
    }
    match serde_json::from_value::<JobSpec>(job) {
        Ok(job) => job.check().err().filter(|error| error.field == key).map(|error| error.to_string()),
        Err(error) => Some(error.to_string()),
    }
}

/// The problem of a file that must have every key with its default.
fn check_file(text: &str, defaults: &BTreeMap<String, Value>) -> Option<String> {
    let job = match JobFile::parse(text, Path::new("/jobs/job.yaml")) {
        Ok(file) => leaves(&serde_json::to_value(file.job).unwrap()),
        Err(error) => return Some(error.to_string()),
    };
    let written = leaves(&serde_saphyr::from_str(text).unwrap());
    defaults.iter().find_map(|(key, default)| {
        let is_required = *default == json!("");
        if !written.contains_key(key) {
            return Some(format!("{key} is not in the file"));
        }
        let is_default = is_equal(&job[key], default);
        (!is_required && !is_default).then(|| format!("{key}: {} is not the default {default}", job[key]))
    })
}

/// The dotted keys and the values of all settings.
fn leaves(job: &Value) -> BTreeMap<String, Value> {
    let mut leaves = BTreeMap::new();
    for (key, value) in job.as_object().unwrap() {
        match value {
            Value::Object(section) => {
                leaves.extend(section.iter().map(|(name, value)| (format!("{key}.{name}"), value.clone())));
            }
            value => {
                leaves.insert(key.clone(), value.clone());
            }
        }
    }
    leaves
}

/// Whether two values are equal; `32` equals `32.0`.
fn is_equal(one: &Value, other: &Value) -> bool {
    one == other || one.as_f64().is_some_and(|number| other.as_f64() == Some(number))
}

#[test]
fn the_page_lists_every_key_with_its_default_and_limits() {
    crate::expect_none(problems(&Document::parse(PAGE, &files::text(PAGE))));
}

#[test]
fn mistakes_are_found() {
    let page = files::text(PAGE);
    for (old, new, expected) in [
        ("| `adapter.r` |", "| `adapter.rank` |", "key adapter.rank does not exist"),
        ("| `adapter.r` |", "| `adapter.rank` |", "adapter.r has 0 rows"),
        (
            "| `adapter.r` | integer | `16` |",
            "| `adapter.r` | integer | `8` |",
            "adapter.r: the default is 16, not 8",
        ),
        ("| `adapter.r` | integer |", "| `adapter.r` | boolean |", "adapter.r: boolean is not its type"),
        ("| 1 to 4096 |", "| 1 to 2048 |", "adapter.r: 2049 is accepted"),
        ("| 1 to 4096 |", "| 1 to 5000 |", "adapter.r: 5000 is refused"),
        ("`model.base` | path | required", "`model.base` | path | `base`", "model.base: the default is \"\""),
        (
            "`training.seed` | integer | `42`",
            "`training.seed` | integer | required",
            "training.seed: is not required",
        ),
        ("one of `none`, `nf4`, `int8`", "one of `none`, `nf5`", "nf5 is refused"),
        ("| 0 to below 1 |", "| 0 to 1 |", "adapter.lora_dropout: 1 is refused"),
        ("| above 0; at most 1 |", "| 0 or more |", "training.adam_epsilon: 0 is refused"),
        ("  max_length: 512\n", "  max_length: 513\n", "data.max_length: 513 is not the default 512"),
        ("  seed: 42\n", "", "training.seed is not in the file"),
        ("  seed: 42\n", "  sead: 42\n", "is not a key of a job"),
    ] {
        assert!(page.contains(old), "{old}");
        let found = problems(&Document::parse(PAGE, &page.replace(old, new)));
        assert!(found.iter().any(|problem| problem.contains(expected)), "not {expected:?}, but {found:#?}");
    }
}
