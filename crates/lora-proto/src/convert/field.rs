//! Conversions of single fields.

use std::path::Path;

use lora_spec::FieldError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde::de::value::{Error as WordError, StringDeserializer};

/// Returns a count, or its default if it is missing.
pub(super) fn count(field: &str, value: Option<u64>, default: usize) -> Result<usize, FieldError> {
    value.map_or(Ok(default), |value| {
        usize::try_from(value)
            .map_err(|_| FieldError::new(field, format!("{value} is too large for this machine")))
    })
}

/// Returns the unit variant with a serialized name, or the default if the name is missing.
pub(super) fn parse_enum<T: DeserializeOwned>(
    field: &str,
    value: Option<String>,
    default: T,
) -> Result<T, FieldError> {
    value.map_or(Ok(default), |value| {
        T::deserialize(StringDeserializer::<WordError>::new(value))
            .map_err(|error| FieldError::new(field, error.to_string()))
    })
}

/// Returns the serialized name of a unit variant.
pub(super) fn enum_text(value: &impl Serialize) -> Option<String> {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned))
}

/// Returns a path as text. A path that is not UTF-8 is an error.
pub(super) fn path_text(field: &str, path: &Path) -> Result<String, FieldError> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| FieldError::new(field, format!("{} is not UTF-8", path.display())))
}
