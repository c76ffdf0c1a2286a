//! The `tojson` filter of chat templates: Python's `json.dumps` with `ensure_ascii=False`, as
//! Transformers defines the filter.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, Value};
use serde_json::Value as Json;

use super::dict_view::DictView;
use super::invalid;
use super::number::{PythonNumber, float_repr};

/// The filter `value | tojson(indent=.., separators=.., ensure_ascii=.., sort_keys=..)`. The
/// first three may also be given by position, in the order of Transformers.
pub(super) fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    separators: Option<Vec<String>>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let indent = match indent.map_or_else(|| kwargs.get::<Option<Value>>("indent"), |it| Ok(Some(it)))? {
        Some(indent) if !indent.is_none() => Some(match (indent.as_str(), usize::try_from(indent.clone())) {
            (Some(text), _) => text.to_owned(),
            (_, Ok(spaces)) if spaces <= 64 => " ".repeat(spaces),
            _ => return Err(invalid(format!("indent={indent} is not supported"))),
        }),
        _ => None,
    };
    let separators = separators.map_or_else(|| kwargs.get("separators"), |it| Ok(Some(it)))?;
    let separators = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("separators must be a pair of strings")),
    };
    let flag = |name| Ok::<bool, Error>(kwargs.get::<Option<bool>>(name)?.unwrap_or(false));
    let style = Style {
        indent,
        separators,
        ensure_ascii: ensure_ascii.map_or_else(|| flag("ensure_ascii"), Ok)?,
        sort_keys: flag("sort_keys")?,
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    style.write(value, 0, &mut out)?;
    Ok(out)
}

struct Style {
    indent: Option<String>,
    separators: (String, String),
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match (value.kind(), value.as_str()) {
            (_, Some(text)) => self.write_string(text, out),
            (ValueKind::None, _) => out.push_str("null"),
            (ValueKind::Bool, _) => out.push_str(if value.is_true() { "true" } else { "false" }),
            (ValueKind::Number, _) if !value.is_integer() => {
                out.push_str(&match f64::try_from(value.clone())? {
                    number if number.is_nan() => "NaN".to_owned(),
                    number if number.is_infinite() => float_repr(number).replace("inf", "Infinity"),
                    number => float_repr(number),
                });
            }
            (ValueKind::Number, _) => out.push_str(&value.to_string()),
            _ if value.downcast_object_ref::<DictView>().is_some() => {
                return Err(invalid("tojson: a view of a dict is not JSON; add `| list`"));
            }
            (ValueKind::Seq | ValueKind::Iterable, _) => {
                let items: Vec<Value> = value.try_iter()?.collect();
                let write = |item: &Value, out: &mut String| self.write(item, depth + 1, out);
                self.write_items(['[', ']'], &items, depth, out, write)?;
            }
            (ValueKind::Map, _) => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    pairs.push((key_text(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.write_items(['{', '}'], &pairs, depth, out, |(key, item), out| {
                    self.write_string(key, out);
                    out.push_str(&self.separators.1);
                    self.write(item, depth + 1, out)
                })?;
            }
            _ => match value.downcast_object_ref::<PythonNumber>() {
                Some(number) => out.push_str(&number.text),
                None => return Err(invalid(format!("tojson: a value of type {} is not JSON", value.kind()))),
            },
        }
        Ok(())
    }

    fn write_items<T>(
        &self,
        brackets: [char; 2],
        items: &[T],
        depth: usize,
        out: &mut String,
        write: impl Fn(&T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(brackets[0]);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.separators.0);
            }
            self.new_line(depth + 1, out);
            write(item, out)?;
        }
        if !items.is_empty() {
            self.new_line(depth, out);
        }
        out.push(brackets[1]);
        Ok(())
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn write_string(&self, text: &str, out: &mut String) {
        // serde_json escapes the same characters as Python, and DEL not at all.
        let quoted = Json::from(text).to_string();
        if !self.ensure_ascii {
            return out.push_str(&quoted);
        }
        for c in quoted.chars() {
            if c.is_ascii() && c != '\u{7F}' {
                out.push(c);
            } else {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
            }
        }
    }
}

/// The text of a key: Python writes numbers, booleans and `None` as strings.
fn key_text(key: &Value) -> Result<String, Error> {
    match (key.kind(), key.as_str()) {
        (_, Some(text)) => Ok(text.to_owned()),
        (ValueKind::None, _) => Ok("null".to_owned()),
        (ValueKind::Bool, _) => Ok(key.is_true().to_string()),
        (ValueKind::Number, _) => Ok(super::python::str(key).into_owned()),
        (kind, _) => Err(invalid(format!("tojson: a key of type {kind} is not JSON"))),
    }
}
