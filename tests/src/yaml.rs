//! YAML as plain values.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// The documents of the file at `path`.
pub(crate) fn documents(path: &Path) -> Vec<Value> {
    serde_saphyr::from_multiple(&fs::read_to_string(path).unwrap())
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The items of a list; none where there is nothing.
pub(crate) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    assert!(value.is_null() || value.is_array(), "{value} is no list");
    value.as_array().into_iter().flatten()
}

/// A text.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}
