//! The `tojson` filter of chat templates: Python's `json.dumps` with `ensure_ascii=False`, as
//! Transformers defines the filter.

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde_json::Value as Json;

/// The filter `value | tojson(indent=.., separators=.., ensure_ascii=.., sort_keys=..)`.
pub(crate) fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<(String, String)> =
        match kwargs.get::<Option<Vec<String>>>("separators")?.as_deref() {
            None => None,
            Some([item, key]) => Some((item.clone(), key.clone())),
            Some(_) => return Err(invalid("separators must be a pair of strings")),
        };
    let style = Style {
        indent,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators: separators
            .unwrap_or_else(|| (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned())),
    };
    kwargs.assert_all_used()?;
    let json =
        serde_json::to_value(value).map_err(|err| invalid(&format!("cannot serialize to JSON: {err}")))?;
    let mut out = String::new();
    style.write(&json, 0, &mut out);
    Ok(out.into())
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}

struct Style {
    indent: Option<usize>,
    separators: (String, String),
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Style {
    fn write(&self, value: &Json, depth: usize, out: &mut String) {
        match value {
            Json::Array(items) if !items.is_empty() => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.start_item(i, depth, out);
                    self.write(item, depth + 1, out);
                }
                self.new_line(depth, out);
                out.push(']');
            }
            Json::Object(map) if !map.is_empty() => {
                let mut pairs: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    pairs.sort_by_key(|(key, _)| key.as_str());
                }
                out.push('{');
                for (i, (key, item)) in pairs.into_iter().enumerate() {
                    self.start_item(i, depth, out);
                    self.write_string(key, out);
                    out.push_str(&self.separators.1);
                    self.write(item, depth + 1, out);
                }
                self.new_line(depth, out);
                out.push('}');
            }
            Json::String(text) => self.write_string(text, out),
            other => out.push_str(&other.to_string()),
        }
    }

    fn start_item(&self, i: usize, depth: usize, out: &mut String) {
        if i > 0 {
            out.push_str(&self.separators.0);
        }
        self.new_line(depth + 1, out);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn write_string(&self, text: &str, out: &mut String) {
        let quoted = Json::from(text).to_string();
        if !self.ensure_ascii {
            return out.push_str(&quoted);
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
            }
        }
    }
}
