//! Rewrites the source of a chat template where minijinja has another syntax.

use std::ops::Range;

use regex::{Captures, Regex};

/// Unicode noncharacters that mark generated text. Valid texts do not contain them, and they are
/// removed from the rendered text.
pub(crate) const GENERATED_START: char = '\u{FDD0}';
pub(crate) const GENERATED_END: char = '\u{FDD1}';

/// Returns the source for minijinja, and whether it had `{% generation %}`.
///
/// - All line ends are `\n`, as Jinja reads them.
/// - Transformers' tag `{% generation %}` becomes a `with` block between two marks, which has the
///   same rules of white space and of variables.
/// - `'..' % x` becomes `'..' | format(x)`.
///
/// # Errors
/// None for any template; the message of an invalid regular expression.
pub(crate) fn rewrite(source: &str) -> Result<(String, bool), String> {
    let source = format_operators(&source.replace("\r\n", "\n").replace('\r', "\n"));
    let tag = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").map_err(|err| err.to_string())?;
    let mut found = false;
    let rewritten = tag.replace_all(&source, |tag: &Captures<'_>| {
        found = true;
        let part = |i| tag.get(i).map_or("", |part| part.as_str());
        let (left, right) = (part(1), part(3));
        match part(2) {
            "" => format!("{{%{left} with %}}{{{{ '{GENERATED_START}' }}}}{{% if true {right}%}}"),
            _ => format!("{{%{left} endif %}}{{{{ '{GENERATED_END}' }}}}{{% endwith {right}%}}"),
        }
    });
    Ok((rewritten.into_owned(), found))
}

/// Replaces Python's operator `%` after a string literal.
fn format_operators(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = 0;
    for tag in tags(source) {
        let mut at = tag.start;
        while at < tag.end {
            match source.as_bytes()[at] {
                b'\'' | b'"' => {
                    at = string_end(source, at);
                    let operator = at + (source[at..].len() - source[at..].trim_start().len());
                    let operand = operator + 1;
                    let is_operator = source[operator..].starts_with('%') && operand < tag.end;
                    if let Some(operand) = is_operator.then(|| operand_at(source, operand)).flatten() {
                        let text = source[operand.clone()].trim_end_matches([',', ' ']);
                        out.push_str(&source[rest..at]);
                        out.push_str(&format!("|format({text})"));
                        at = operand.end + usize::from(source[operand.end..].starts_with(')'));
                        rest = at;
                    }
                }
                _ => at += 1,
            }
        }
    }
    out + &source[rest..]
}

/// The insides of the tags `{{ .. }}` and `{% .. %}`.
fn tags(source: &str) -> Vec<Range<usize>> {
    let mut tags = Vec::new();
    let mut at = 0;
    while let Some(found) = source[at..].find('{') {
        let start = at + found + 2;
        let close = match source.as_bytes().get(start - 1) {
            Some(b'{') => "}}",
            Some(b'%') => "%}",
            Some(b'#') => {
                at = source[start..].find("#}").map_or(source.len(), |end| start + end + 2);
                continue;
            }
            _ => {
                at = start - 1;
                continue;
            }
        };
        let mut end = start;
        while end < source.len() && !source[end..].starts_with(close) {
            end = match source.as_bytes()[end] {
                b'\'' | b'"' => string_end(source, end),
                _ => end + source[end..].chars().next().map_or(1, char::len_utf8),
            };
        }
        tags.push(start..end);
        at = (end + 2).min(source.len());
    }
    tags
}

/// The end of the string literal that begins at `start`.
fn string_end(source: &str, start: usize) -> usize {
    let quote = source.as_bytes()[start];
    let mut at = start + 1;
    while let Some(&byte) = source.as_bytes().get(at) {
        match byte {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    source.len()
}

/// The operand at or after `start`: the inside of brackets, or a name, a number or a string with
/// what follows without a space (attributes, calls, items).
fn operand_at(source: &str, start: usize) -> Option<Range<usize>> {
    let start = start + (source[start..].len() - source[start..].trim_start().len());
    if source[start..].starts_with('(') {
        let end = bracket_end(source, start)?;
        return Some(start + 1..end - 1);
    }
    let mut at = start;
    loop {
        match source[at..].chars().next() {
            Some('(') if at > start => at = bracket_end(source, at)?,
            Some('[') => at = bracket_end(source, at)?,
            Some('\'' | '"') if at == start => at = string_end(source, at),
            Some(c) if c.is_alphanumeric() || c == '_' || c == '.' => at += c.len_utf8(),
            _ => break,
        }
    }
    (at > start).then_some(start..at)
}

/// The end of the bracket that opens at `start`.
fn bracket_end(source: &str, start: usize) -> Option<usize> {
    let mut depth = 0;
    let mut at = start;
    while let Some(&byte) = source.as_bytes().get(at) {
        match byte {
            b'\'' | b'"' => {
                at = string_end(source, at);
                continue;
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        at += 1;
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::environment;
    use super::*;

    /// Templates and their text in Jinja with `trim_blocks` and `lstrip_blocks`.
    #[test]
    fn python_formats_strings_with_an_operator() {
        let environment = environment().unwrap();
        for (template, text) in [
            ("{{ '%s-%02d' % ('a', 7) }}", "a-07"),
            ("{{ \"%s\" % x }}|{{ '%s!' % x.upper() }}", "é|É!"),
            ("{{ '%.2f' % 0.5 + '%' }} {{ 7 % 4 }} {{ 'a%' ~ '%s' % (x,) }}", "0.50% 3 a%é"),
            ("{% if '%s' % x == 'é' %}yes{% endif %} '%s' % x {# '%s' % x #}", "yes '%s' % x "),
            ("{% set y = '[%s]' % [x][0] %}{{ y }}", "[é]"),
            ("a\r\nb\rc", "a\nb\nc"),
            ("{{ 'it\\'s %s' % x }}{{ '%}' }}", "it's é%}"),
        ] {
            let (source, found) = rewrite(template).unwrap();
            let rendered = environment.render_str(&source, minijinja::context! { x => "é" });
            assert_eq!(rendered.unwrap(), text, "{template}");
            assert!(!found);
        }
    }
}
