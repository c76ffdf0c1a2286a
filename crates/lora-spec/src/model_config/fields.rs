//! Typed access to the fields of a `config.json`.

use serde_json::Value;

/// The fields of a JSON object. A field with the value null counts as missing.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Value);

impl<'a> Fields<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// Whether the field is present with the value null.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.0.get(key).is_some_and(Value::is_null)
    }

    pub(super) fn count(&self, key: &str) -> Result<usize, String> {
        self.count_or(key, None)
    }

    /// A count, or `default` if the field is missing.
    pub(super) fn count_or(&self, key: &str, default: Option<usize>) -> Result<usize, String> {
        self.optional_count(key)?.or(default).ok_or_else(|| format!("{key}: is missing"))
    }

    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>, String> {
        self.get(key)
            .map(|v| {
                let count = v.as_u64().filter(|c| (1..=1 << 24).contains(c));
                let message = || format!("{key}: {v} is not a whole number from 1 to {}", 1 << 24);
                count.map(|c| c as usize).ok_or_else(message)
            })
            .transpose()
    }

    /// The sliding window: none if the field is null, and `default` if it is missing.
    pub(super) fn window(&self, default: Option<usize>) -> Result<Option<usize>, String> {
        const KEY: &str = "sliding_window";
        let default = default.filter(|_| !self.is_null(KEY));
        Ok(self.optional_count(KEY)?.or(default))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, String> {
        self.get(key).map(|v| v.as_f64().ok_or_else(|| format!("{key}: {v} is not a number"))).transpose()
    }

    /// A number above 0, or `default` if the field is missing. Where the field is null,
    /// Transformers fails or computes something else than with its default.
    pub(super) fn positive(&self, key: &str, default: f64) -> Result<f64, String> {
        if self.is_null(key) {
            return Err(format!("{key}: null is not a positive number"));
        }
        let value = self.number(key)?.unwrap_or(default);
        if value.is_finite() && value > 0.0 {
            Ok(value)
        } else {
            Err(format!("{key}: {value} is not a positive number"))
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.get(key)
            .map(|v| v.as_bool().ok_or_else(|| format!("{key}: {v} is neither true nor false")))
            .transpose()
    }

    /// A list with one element for each of `layers` blocks.
    pub(super) fn per_layer(&self, key: &str, layers: usize) -> Result<Option<&'a Vec<Value>>, String> {
        let Some(list) = self.get(key) else { return Ok(None) };
        let list = list.as_array().filter(|list| list.len() == layers);
        list.map(Some).ok_or(format!("{key}: must be a list of {layers}, one for each block"))
    }
}
