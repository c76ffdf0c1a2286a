//! Jinja as Transformers renders chat templates with it: minijinja, and in this directory what it
//! lacks or does otherwise.

mod conditions;
mod cycler;
mod dict_view;
#[cfg(test)]
mod expression_tests;
mod filters;
mod method_names;
mod methods;
mod number;
mod python;
mod safe_texts;
mod source;
mod tojson;
mod value_tests;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value};

pub(crate) use conditions::check_conditions;
pub(crate) use method_names::check_method_names;
pub(crate) use number::value_of;
pub(crate) use safe_texts::check_safe_texts;
pub(crate) use source::{GENERATED_END, GENERATED_START, rewrite};

/// Limit of the work of a template: about twenty million instructions, or a GiB of text.
const FUEL: u64 = 20_000_000;

/// Returns an environment like that of Transformers: `trim_blocks` and `lstrip_blocks`, loop
/// controls, Python's methods on strings, dicts and lists, Python's text of values, `tojson`,
/// `raise_exception` and `strftime_now`.
///
/// # Errors
/// The message of the template engine.
pub(crate) fn environment() -> Result<Environment<'static>, String> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|err| err.to_string())?);
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(|out, _, value| {
        out.write_str(&python::str(value)).map_err(|_| Error::from(ErrorKind::WriteFailure))
    });
    environment.set_unknown_method_callback(methods::call);
    environment.add_filter("tojson", tojson::tojson);
    filters::add(&mut environment);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_function("cycler", cycler::cycler);
    value_tests::add(&mut environment);
    Ok(environment)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(invalid(message))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Formats Friday, 26 July 2024, 00:00:00 like Python's `strftime`: a result must not depend on the
/// day of the run. The templates of Llama 3 write this date if the function is missing.
fn strftime_now(format: String) -> Result<String, Error> {
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // The flag `-` of glibc removes leading zeros.
        let (bare, directive) = match rest.next() {
            Some('-') => (true, rest.next()),
            directive => (false, directive),
        };
        let value = directive
            .and_then(date_part)
            .ok_or_else(|| invalid(format!("strftime_now does not support the format {format:?}")))?;
        match value.trim_start_matches('0') {
            "" if bare && !value.is_empty() => out.push('0'),
            trimmed if bare => out.push_str(trimmed),
            _ => out.push_str(value),
        }
    }
    Ok(out)
}

fn date_part(directive: char) -> Option<&'static str> {
    Some(match directive {
        'Y' => "2024",
        'y' => "24",
        'm' => "07",
        'B' => "July",
        'b' | 'h' => "Jul",
        'd' | 'e' => "26",
        'j' => "208",
        'A' => "Friday",
        'a' => "Fri",
        'w' | 'u' => "5",
        'H' | 'M' | 'S' => "00",
        'I' => "12",
        'p' => "AM",
        'F' => "2024-07-26",
        'D' | 'x' => "07/26/24",
        'T' | 'X' => "00:00:00",
        'R' => "00:00",
        'c' => "Fri Jul 26 00:00:00 2024",
        'Z' | 'z' => "",
        '%' => "%",
        _ => return None,
    })
}
