//! The text that Python gives to a value: `str` and `repr`.

use std::borrow::Cow;
use std::fmt::Write as _;

use minijinja::Value;
use minijinja::value::ValueKind;

use super::dict_view::DictView;
use super::number::{PythonNumber, float_repr};

/// Python's `str(value)`. A template writes an undefined value as nothing.
pub(super) fn str(value: &Value) -> Cow<'_, str> {
    match value.as_str() {
        Some(text) => Cow::Borrowed(text),
        None if value.is_undefined() => Cow::Borrowed(""),
        None => Cow::Owned(repr(value)),
    }
}

/// Python's `repr(value)`.
pub(super) fn repr(value: &Value) -> String {
    let mut out = String::new();
    write_repr(value, &mut out);
    out
}

fn write_repr(value: &Value, out: &mut String) {
    match (value.kind(), value.as_str()) {
        (_, Some(text)) => write_quoted(text, out),
        (ValueKind::Undefined, _) => out.push_str("Undefined"),
        (ValueKind::Number, _) if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) => out.push_str(&float_repr(number)),
            Err(_) => out.push_str(&value.to_string()),
        },
        // A list may be lazy here, such as a slice.
        (ValueKind::Seq | ValueKind::Iterable, _) => {
            let view = value.downcast_object_ref::<DictView>().map(|view| view.name);
            let is_tuple = value.is_tuple();
            out.extend(view.into_iter().flat_map(|name| [name, "("]));
            out.push(if is_tuple { '(' } else { '[' });
            for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                write_repr(&item, out);
            }
            out.push_str(match (is_tuple, value.len()) {
                (true, Some(1)) => ",)",
                (true, _) => ")",
                (false, _) => "]",
            });
            out.push_str(if view.is_some() { ")" } else { "" });
        }
        (ValueKind::Map, _) => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                write_repr(&key, out);
                out.push_str(": ");
                write_repr(&value.get_item(&key).unwrap_or_default(), out);
            }
            out.push('}');
        }
        // True, False, None, integers, and objects with a text of their own.
        _ => match value.downcast_object_ref::<PythonNumber>() {
            Some(number) => out.push_str(&number.text),
            None => out.push_str(&value.to_string()),
        },
    }
}

/// Appends a string in quotes: double ones if it has single ones and no double ones.
fn write_quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote || c == '\\' => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            // A `String` accepts everything that is written.
            c if c <= '\u{FF}' => drop(write!(out, "\\x{:02x}", u32::from(c))),
            c if c <= '\u{FFFF}' => drop(write!(out, "\\u{:04x}", u32::from(c))),
            c => drop(write!(out, "\\U{:08x}", u32::from(c))),
        }
    }
    out.push(quote);
}

fn is_printable(c: char) -> bool {
    // After another character, `escape_debug` keeps combining characters, as Python does.
    let after_another = format!("a{c}");
    let is_other_space = c.is_whitespace() && c != ' ';
    !is_other_space && !after_another.escape_debug().any(|escaped| escaped == '{')
        || matches!(c, '{' | '"' | '\'' | '\\')
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::value_of;
    use super::*;

    #[test]
    fn values_have_the_text_of_python() {
        for (value, text) in [
            (json!(null), "None"),
            (json!(true), "True"),
            (json!(-3), "-3"),
            (json!(2.0), "2.0"),
            (json!(1e-7), "1e-07"),
            (json!("it's"), "it's"),
            (json!([]), "[]"),
            (json!({}), "{}"),
            (
                json!(["a", "it's", "\"it's\"", "é\u{301}\u{200b}\n\u{7f}{"]),
                r#"['a', "it's", '"it\'s"', 'éé\u200b\n\x7f{']"#,
            ),
            (
                json!({"b": [1, 2.5, null], "a": {"c": false, "d": 1e20}}),
                "{'b': [1, 2.5, None], 'a': {'c': False, 'd': 1e+20}}",
            ),
        ] {
            let expected = text.replace("éé", "é\u{301}");
            assert_eq!(str(&value_of(&value)), expected);
        }
        assert_eq!(str(&Value::UNDEFINED), "");
    }
}
