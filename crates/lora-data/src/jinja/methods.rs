//! Methods of Python's strings and lists that minijinja-contrib lacks, or has without their
//! optional arguments.

use std::ops::Range;

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::dict_view::DictView;
use super::invalid;

/// The longest text that a method pads to.
const MAX_WIDTH: usize = 1 << 16;

/// Calls a method of a value.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match (value.kind(), value.as_str()) {
        (_, Some(text)) => of_string(text, method, args),
        (ValueKind::Seq, _) => of_list(value, method, args),
        (ValueKind::Map, _) => DictView::call(value, method, args),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    };
    match own {
        Err(error) if error.kind() == ErrorKind::UnknownMethod => {
            pycompat::unknown_method_callback(state, value, method, args)
        }
        result => result,
    }
}

fn of_string(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    Ok(match method {
        "rsplit" => rsplit(text, args)?,
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let is_stripped = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            match method {
                "strip" => text.trim_matches(is_stripped),
                "lstrip" => text.trim_start_matches(is_stripped),
                _ => text.trim_end_matches(is_stripped),
            }
            .into()
        }
        // A width is at most four digits long.
        "format" if text.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 4) => {
            return Err(invalid("a width of more than four digits is not supported"));
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            match text.split_once(nonempty(separator)?) {
                Some((before, after)) => parts([before, separator, after]),
                None => parts([text, "", ""]),
            }
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            match text.rsplit_once(nonempty(separator)?) {
                Some((before, after)) => parts([before, separator, after]),
                None => parts(["", "", text]),
            }
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "title" => {
            let () = from_args(args)?;
            title(text).into()
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            if let Some(item) = items.try_iter()?.find(|item| item.as_str().is_none()) {
                return Err(invalid(format!("join: an item is not a string but of type {}", item.kind())));
            }
            return Err(Error::from(ErrorKind::UnknownMethod));
        }
        "casefold" => text.to_lowercase().into(),
        "swapcase" => text.chars().flat_map(swapped).collect::<String>().into(),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", "0".repeat(missing(text, width)?)).into()
        }
        "center" | "ljust" | "rjust" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let fill = fill.unwrap_or(' ');
            let padding = || Ok::<_, Error>(fill.to_string().repeat(missing(text, width)?));
            match method {
                "ljust" => format!("{text}{}", padding()?).into(),
                "rjust" => format!("{}{text}", padding()?).into(),
                _ => center(text, width, fill)?.into(),
            }
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let within = bounds(text, start, end);
            let found = within.clone().and_then(|within| match method.starts_with('r') {
                true => text[within].rfind(what),
                false => text[within].find(what),
            });
            match found {
                Some(at) => {
                    let start = within.map_or(0, |within| within.start);
                    (text[..start + at].chars().count() as i64).into()
                }
                None if method.ends_with("index") => return Err(invalid("substring not found")),
                None => (-1).into(),
            }
        }
        "count" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let within = bounds(text, start, end).map_or("", |within| &text[within]);
            match what.is_empty() {
                true => within.chars().count() + 1,
                false => within.matches(what).count(),
            }
            .into()
        }
        "isdecimal" => (!text.is_empty() && text.chars().all(|c| c.is_numeric())).into(),
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    })
}

/// Pads a text on both sides.
pub(super) fn center(text: &str, width: usize, fill: char) -> Result<String, Error> {
    let missing = missing(text, width)?;
    // Python puts the odd character on the left if the width is odd.
    let left = missing / 2 + (missing & width & 1);
    let fill = |count| fill.to_string().repeat(count);
    Ok(format!("{}{text}{}", fill(left), fill(missing - left)))
}

/// The text with a capital after each character that has no case.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut is_within = false;
    for c in text.chars() {
        match is_within {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        is_within = c.is_lowercase() || c.is_uppercase();
    }
    out
}

fn of_list(list: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match method {
        "index" => {
            let (what,): (&Value,) = from_args(args)?;
            let place = list.try_iter()?.position(|item| item == *what);
            place.map(Value::from).ok_or_else(|| invalid("the list does not have the value"))
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, splits): (Option<&str>, Option<i64>) = from_args(args)?;
    let limit = splits.and_then(|splits| usize::try_from(splits).ok());
    let pieces = limit.map_or(usize::MAX, |limit| limit + 1);
    let mut parts: Vec<&str> = match separator {
        Some(separator) => text.rsplitn(pieces, nonempty(separator)?).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end();
            while !rest.is_empty() {
                match rest.rfind(char::is_whitespace).filter(|_| parts.len() + 1 < pieces) {
                    Some(at) => {
                        parts.push(rest[at..].trim_start());
                        rest = rest[..at].trim_end();
                    }
                    None => {
                        parts.push(if parts.len() + 1 < pieces { rest.trim_start() } else { rest });
                        break;
                    }
                }
            }
            parts
        }
    };
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Python's white space has four control characters more than Unicode's.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1C}'..='\u{1F}')
}

fn parts(parts: [&str; 3]) -> Value {
    parts.into_iter().map(Value::from).collect()
}

fn nonempty(separator: &str) -> Result<&str, Error> {
    match separator.is_empty() {
        true => Err(invalid("empty separator")),
        false => Ok(separator),
    }
}

fn swapped(c: char) -> impl Iterator<Item = char> {
    let (lower, upper) = match c.is_uppercase() {
        true => (Some(c.to_lowercase()), None),
        false => (None, Some(c.to_uppercase())),
    };
    lower.into_iter().flatten().chain(upper.into_iter().flatten())
}

/// The number of characters that `text` lacks to have `width` characters.
fn missing(text: &str, width: usize) -> Result<usize, Error> {
    match width > MAX_WIDTH {
        true => Err(invalid(format!("a width of {width} is not supported"))),
        false => Ok(width.saturating_sub(text.chars().count())),
    }
}

/// The bytes of `text[start:end]`, whose bounds count characters, from the end if negative. `None`
/// if the range ends before it starts.
fn bounds(text: &str, start: Option<i64>, end: Option<i64>) -> Option<Range<usize>> {
    let length = text.chars().count() as i64;
    let place = |bound: i64| if bound < 0 { (bound + length).max(0) } else { bound };
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(length)).min(length));
    let byte = |place: i64| text.char_indices().nth(place as usize).map_or(text.len(), |(byte, _)| byte);
    (start <= end).then(|| byte(start)..byte(end))
}

#[cfg(test)]
mod tests {
    use super::super::environment;

    /// Expressions and their text in Python 3.11.
    #[test]
    fn methods_give_what_python_gives() {
        let environment = environment().unwrap();
        for (expression, text) in [
            ("'a,b,c'.rsplit(',', 1)", "['a,b', 'c']"),
            ("'a,b,c'.rsplit(',')", "['a', 'b', 'c']"),
            ("'  a  b c '.rsplit()", "['a', 'b', 'c']"),
            ("'  a  b c '.rsplit(none, 1)", "['  a  b', 'c']"),
            ("''.rsplit()", "[]"),
            ("'a=b=c'.partition('=') | join('|')", "a|=|b=c"),
            ("'a=b=c'.rpartition('=') | join('|')", "a=b|=|c"),
            ("'abc'.partition('=') | join('|')", "abc||"),
            ("'abc'.rpartition('=') | join('|')", "||abc"),
            ("'abc'.removeprefix('ab') + 'abc'.removesuffix('bc')", "ca"),
            ("'abc'.removeprefix('x')", "abc"),
            ("'Straße'.swapcase() + 'ÀB'.casefold()", "sTRASSEàb"),
            ("'-7'.zfill(4) + '42'.zfill(1) + 'é'.zfill(3)", "-0074200é"),
            ("'ab'.center(5) + '|' + 'ab'.center(5, '*')", "  ab |**ab*"),
            ("'abc'.center(6, '*') + 'ab'.ljust(3, '.') + 'ab'.rjust(3)", "*abc**ab. ab"),
            ("'äbcb'.find('b') ~ ' ' ~ 'äbcb'.rfind('b') ~ ' ' ~ 'ab'.find('x')", "1 3 -1"),
            ("'äbcb'.index('b', 2) ~ ' ' ~ 'äbcb'.rindex('b', 0, -1)", "3 1"),
            ("'abc'.find('', 5) ~ ' ' ~ 'abc'.find('c', -1)", "-1 2"),
            ("'banana'.count('an') ~ ' ' ~ 'banana'.count('a', 2) ~ ' ' ~ 'ab'.count('')", "2 2 3"),
            ("[1, 'b'].index('b')", "1"),
            ("'a b'.split() | length", "2"),
            ("'ab'.upper().lower().title()", "Ab"),
            ("\"they're x-ray 3d ÉA\".title()", "They'Re X-Ray 3D Éa"),
        ] {
            let rendered = environment.render_str(&format!("{{{{ {expression} }}}}"), ()).unwrap();
            assert_eq!(rendered, text, "{expression}");
        }
        for expression in ["'a'.index('b')", "[1].index(2)", "'a'.rsplit('')", "'a'.center(99999999)"] {
            assert!(environment.render_str(&format!("{{{{ {expression} }}}}"), ()).is_err(), "{expression}");
        }
    }
}
