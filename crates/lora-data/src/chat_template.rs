//! The chat template of a base, rendered as in Transformers' `apply_chat_template`.

use std::collections::BTreeMap;
use std::ops::Range;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, State, Value, context};
use regex::{Captures, Regex};
use serde_json::Value as Json;

use crate::Message;
use crate::tojson::tojson;

/// A compiled chat template.
///
/// The environment is that of Transformers: `trim_blocks` and `lstrip_blocks`, loop controls,
/// Python's methods on strings, dicts and lists, `raise_exception`, `tojson`, `strftime_now`, and
/// the base's special tokens as variables.
///
/// `strftime_now` formats a fixed date, 26 July 2024 at midnight, because a result must not depend
/// on the day of the run. The templates of Llama 3 write this date if the function is missing.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    has_generation_markers: bool,
}

/// A rendered conversation.
pub(crate) struct Rendered {
    pub(crate) text: String,
    /// Byte ranges of `text` that the template wrote between `{% generation %}` and
    /// `{% endgeneration %}`.
    pub(crate) generated: Vec<Range<usize>>,
}

const NAME: &str = "chat_template";
/// Limit of the work of a template: about twenty million instructions, or a GiB of text.
const FUEL: u64 = 20_000_000;
/// Unicode noncharacters that mark generated text. Valid texts do not contain them, and they are
/// removed from the rendered text.
const GENERATED_START: char = '\u{FDD0}';
const GENERATED_END: char = '\u{FDD1}';

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// The message of the template engine.
    pub(crate) fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self, String> {
        let (source, has_generation_markers) = rewrite_generation_tags(source)?;
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|err| err.to_string())?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_function("mark_generation", mark_generation);
        for (name, token) in special_tokens {
            environment.add_global(name.clone(), token.clone());
        }
        environment.add_template_owned(NAME, source).map_err(|err| err.to_string())?;
        Ok(Self { environment, has_generation_markers })
    }

    /// Returns whether the template marks the trained text with `{% generation %}`.
    pub(crate) fn has_generation_markers(&self) -> bool {
        self.has_generation_markers
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// The message of the template (`raise_exception`) or of the template engine; a noncharacter in
    /// a message, or nested `{% generation %}` blocks.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, String> {
        if self.has_generation_markers && has_noncharacters(messages, tools) {
            return Err("a message contains the noncharacter U+FDD0 or U+FDD1; remove it".into());
        }
        // Transformers defines `tools` and `documents` as None if the caller passes none.
        let text = self
            .environment
            .get_template(NAME)
            .and_then(|template| {
                template.render(context! {
                    messages => Value::from(Serde(messages)),
                    tools => Value::from(Serde(tools)),
                    documents => (),
                    add_generation_prompt,
                })
            })
            .map_err(|err| format!("the chat template fails: {err}"))?;
        if self.has_generation_markers {
            strip_markers(&text)
        } else {
            Ok(Rendered { text, generated: Vec::new() })
        }
    }
}

/// Replaces Transformers' tag `{% generation %}` with a call block, which has the same white-space
/// rules. Returns the source, and whether it had such a tag.
fn rewrite_generation_tags(source: &str) -> Result<(String, bool), String> {
    let tag = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").map_err(|err| err.to_string())?;
    let mut found = false;
    let rewritten = tag.replace_all(source, |tag: &Captures<'_>| {
        found = true;
        let part = |i| tag.get(i).map_or("", |part| part.as_str());
        let call = if part(2).is_empty() { "call mark_generation()" } else { "endcall" };
        format!("{{%{} {call} {}%}}", part(1), part(3))
    });
    Ok((rewritten.into_owned(), found))
}

fn mark_generation(state: &mut State, kwargs: Kwargs) -> Result<String, Error> {
    let caller: Value = kwargs.get("caller")?;
    let text = caller.call(state, &[])?;
    Ok(format!("{GENERATED_START}{text}{GENERATED_END}"))
}

fn strip_markers(marked: &str) -> Result<Rendered, String> {
    let mut text = String::with_capacity(marked.len());
    let mut generated = Vec::new();
    let mut start = None;
    for c in marked.chars() {
        match (c, start) {
            (GENERATED_START, None) => start = Some(text.len()),
            (GENERATED_END, Some(begin)) => {
                generated.push(begin..text.len());
                start = None;
            }
            (GENERATED_START | GENERATED_END, _) => {
                return Err("the chat template nests {% generation %} blocks".into());
            }
            (c, _) => text.push(c),
        }
    }
    Ok(Rendered { text, generated })
}

fn has_noncharacters(messages: &[Message], tools: Option<&Json>) -> bool {
    let json = serde_json::to_string(&(messages, tools)).unwrap_or_default();
    json.contains([GENERATED_START, GENERATED_END])
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Formats Friday, 26 July 2024, 00:00:00 like Python's `strftime`.
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
        let value = directive.and_then(date_part).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidOperation,
                format!("strftime_now does not support the format {format:?}"),
            )
        })?;
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
