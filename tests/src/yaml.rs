//! YAML files as JSON values.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// Returns the documents of the file at `path`.
pub(crate) fn documents(path: &Path) -> Vec<Value> {
    serde_saphyr::from_multiple(&fs::read_to_string(path).unwrap())
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the items of a list. A null value has no items.
pub(crate) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    assert!(value.is_null() || value.is_array(), "{value} is not a list");
    value.as_array().into_iter().flatten()
}

/// Returns a string value.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a string")).to_owned()
}
