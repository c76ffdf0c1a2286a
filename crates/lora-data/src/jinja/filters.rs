//! Jinja's filters that minijinja lacks, or has otherwise.

use minijinja::value::{ArgType, Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, Value};
use minijinja_contrib::filters::filesizeformat;

use super::{invalid, methods, python};

/// The longest text on one line that `pprint` gives.
const PPRINT_WIDTH: usize = 80;

/// Adds the filters.
pub(super) fn add(environment: &mut Environment<'_>) {
    environment.add_filter("string", |value: &Value| python::str(value).into_owned());
    environment.add_filter("trim", |value: &Value, chars: Option<&str>| {
        let text = if value.is_undefined() { "".into() } else { python::str(value) };
        match chars {
            Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
            None => text.trim_matches(methods::is_space).to_owned(),
        }
    });
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("forceescape", |value: &Value| escaped(&python::str(value)));
    environment.add_filter("xmlattr", xmlattr);
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordcount", |text: &str| {
        text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("center", |value: &Value, width: Option<usize>, kwargs: Kwargs| {
        let width = argument(width, &kwargs, "width", 80)?;
        kwargs.assert_all_used()?;
        methods::center(&python::str(value), width, ' ')
    });
    environment.add_filter("filesizeformat", file_size);
    environment.add_filter("pprint", pprint);
}

/// An argument that may be given by position or by name.
fn argument<T: for<'a> ArgType<'a, Output = T>>(
    positional: Option<T>,
    kwargs: &Kwargs,
    name: &'static str,
    default: T,
) -> Result<T, Error> {
    match positional {
        Some(value) => Ok(value),
        None if kwargs.has(name) => kwargs.get(name),
        None => Ok(default),
    }
}

fn escape(value: &Value) -> Value {
    match value.is_safe() {
        true => value.clone(),
        false => escaped(&python::str(value)),
    }
}

/// Escapes a text as Python's `markupsafe`.
fn escaped(text: &str) -> Value {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    Value::from_safe_string(out)
}

fn xmlattr(map: &Value, autospace: Option<bool>, kwargs: Kwargs) -> Result<Value, Error> {
    let autospace = argument(autospace, &kwargs, "autospace", true)?;
    kwargs.assert_all_used()?;
    if map.kind() != ValueKind::Map {
        return Err(invalid(format!("xmlattr: a value of type {} is not a mapping", map.kind())));
    }
    let mut attributes = Vec::new();
    for key in map.try_iter()? {
        let value = map.get_item(&key)?;
        if value.is_none() || value.is_undefined() {
            continue;
        }
        let key = python::str(&key).into_owned();
        if key.contains(|c: char| methods::is_space(c) || "/>=".contains(c)) {
            return Err(invalid(format!("xmlattr: {key:?} is not the name of an attribute")));
        }
        attributes.push(format!("{}=\"{}\"", escaped(&key), escape(&value)));
    }
    let space = if autospace && !attributes.is_empty() { " " } else { "" };
    Ok(Value::from_safe_string(format!("{space}{}", attributes.join(" "))))
}

/// The filter `text | truncate(length, killwords, end, leeway)`.
fn truncate(text: &str, arguments: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let (length, killwords, end, leeway): (Option<usize>, Option<bool>, Option<String>, Option<usize>) =
        minijinja::value::from_args(&arguments)?;
    let length = argument(length, &kwargs, "length", 255)?;
    let killwords = argument(killwords, &kwargs, "killwords", false)?;
    let end = argument(end, &kwargs, "end", "...".to_owned())?;
    let leeway = argument(leeway, &kwargs, "leeway", 5)?;
    kwargs.assert_all_used()?;
    let Some(kept) = length.checked_sub(end.chars().count()) else {
        return Err(invalid(format!("truncate: a length of {length} is shorter than {end:?}")));
    };
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let start = text.char_indices().nth(kept).map_or(text, |(at, _)| &text[..at]);
    let start = if killwords { start } else { start.rsplit_once(' ').map_or(start, |(words, _)| words) };
    Ok(format!("{start}{end}"))
}

fn file_size(value: &Value, binary: Option<bool>, kwargs: Kwargs) -> Result<String, Error> {
    let binary = argument(binary, &kwargs, "binary", false)?;
    kwargs.assert_all_used()?;
    let bytes = match value.as_str() {
        Some(text) => text.trim().parse().map_err(|_| invalid(format!("{text:?} is not a number")))?,
        None => f64::try_from(value.clone())?,
    };
    // minijinja's filter prints fractions of bytes, and has prefixes for negative numbers.
    match bytes < if binary { 1024.0 } else { 1000.0 } && bytes != 1.0 {
        true => Ok(format!("{} Bytes", bytes.trunc())),
        false => Ok(filesizeformat(bytes, Some(binary))),
    }
}

/// Python's `pprint.pformat` of a value that fits on a line.
fn pprint(value: &Value) -> Result<String, Error> {
    let text = python::repr(&sorted(value)?);
    match text.chars().count() > PPRINT_WIDTH {
        true => {
            Err(invalid(format!("pprint: a text of more than {PPRINT_WIDTH} characters is not supported")))
        }
        false => Ok(text),
    }
}

/// The value, its mappings sorted by their keys.
fn sorted(value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Seq if !value.is_tuple() => {
            Ok(value.try_iter()?.map(|item| sorted(&item)).collect::<Result<Vec<_>, _>>()?.into())
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            keys.sort();
            let pairs = keys.into_iter().map(|key| {
                let item = sorted(&value.get_item(&key)?)?;
                Ok::<_, Error>((key, item))
            });
            Ok(Value::from_pairs(pairs.collect::<Result<Vec<_>, _>>()?))
        }
        _ => Ok(value.clone()),
    }
}
