//! Rewrites the source of a chat template where minijinja has another syntax.

use std::ops::Range;

/// Unicode noncharacters that mark generated text. Valid texts do not contain them, and they are
/// removed from the rendered text.
pub(crate) const GENERATED_START: char = '\u{FDD0}';
pub(crate) const GENERATED_END: char = '\u{FDD1}';

/// A tag `{{ .. }}` or `{% .. %}`.
pub(super) struct Tag {
    /// The text between the brackets.
    pub(super) inside: Range<usize>,
    pub(super) is_block: bool,
}

/// Returns the source for minijinja, and whether it had `{% generation %}`.
///
/// - All line ends are `\n`, as Jinja reads them.
/// - Transformers' tag `{% generation %}` becomes a `with` block between two marks, which has the
///   same rules of white space and of variables.
/// - `'..' % x` becomes `'..' | format(x)`.
///
/// Comments and `{% raw %}` blocks stay as they are.
pub(crate) fn rewrite(source: &str) -> (String, bool) {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut has_generation = false;
    let (mut out, mut rest) = (String::with_capacity(source.len()), 0);
    for Tag { inside, is_block } in tags(&source) {
        let text = &source[inside.clone()];
        let left = text.len() - text.trim_start_matches(['-', '+']).len();
        let right = text.len() - text.trim_end_matches(['-', '+']).len();
        let name = text.get(left..text.len() - right).map(str::trim);
        let (left, right) = (&text[..left.min(1)], &text[text.len() - right.min(1)..]);
        let tag = inside.start - 2..(inside.end + 2).min(source.len());
        match name.filter(|_| is_block) {
            Some("generation") => {
                has_generation = true;
                out.push_str(&source[rest..tag.start]);
                let mark = format!("{{{{ '{GENERATED_START}' }}}}");
                out.push_str(&format!("{{%{left} with %}}{mark}{{% if true {right}%}}"));
                rest = tag.end;
            }
            Some("endgeneration") => {
                out.push_str(&source[rest..tag.start]);
                let mark = format!("{{{{ '{GENERATED_END}' }}}}");
                out.push_str(&format!("{{%{left} endif %}}{mark}{{% endwith {right}%}}"));
                rest = tag.end;
            }
            _ => format_operators(&source, inside, &mut out, &mut rest),
        }
    }
    (out + &source[rest..], has_generation)
}

/// Replaces Python's operator `%` after a string literal in a tag.
fn format_operators(source: &str, tag: Range<usize>, out: &mut String, rest: &mut usize) {
    let mut at = tag.start;
    while at < tag.end {
        if !matches!(source.as_bytes()[at], b'\'' | b'"') {
            at += 1;
            continue;
        }
        at = string_end(source, at);
        let operator = skip_space(source, at);
        if operator >= tag.end || !source[operator..].starts_with('%') {
            continue;
        }
        if let Some((operand, arguments)) =
            operand_at(source, operator + 1).filter(|(it, _)| it.end <= tag.end)
        {
            out.push_str(&source[*rest..at]);
            out.push_str(&format!("|format({})", source[arguments].trim_end_matches([',', ' '])));
            at = operand.end;
            *rest = at;
        }
    }
}

fn skip_space(source: &str, at: usize) -> usize {
    at + (source[at..].len() - source[at..].trim_start().len())
}

/// The tags outside of comments and raw blocks.
pub(super) fn tags(source: &str) -> Vec<Tag> {
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
        at = (end + 2).min(source.len());
        let is_block = close == "%}";
        if is_block && source[start..end].trim_matches(['-', '+', ' ', '\n', '\t']) == "raw" {
            at = source[at..].find("endraw").map_or(source.len(), |end| at + end);
        }
        tags.push(Tag { inside: start..end, is_block });
    }
    tags
}

/// The end of the string literal that begins at `start`.
pub(super) fn string_end(source: &str, start: usize) -> usize {
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

/// The code of a tag with its string literals empty.
pub(super) fn without_strings(code: &str) -> String {
    let (mut out, mut at) = (String::with_capacity(code.len()), 0);
    while let Some(c) = code[at..].chars().next() {
        match c {
            '\'' | '"' => {
                out.push_str("''");
                at = string_end(code, at).min(code.len());
            }
            c => {
                out.push(c);
                at += c.len_utf8();
            }
        }
    }
    out
}

/// The operand at or after `start`, and the arguments of `format` in it: the inside of brackets, or
/// the whole operand. An operand is a bracket, a name, a number or a string with what follows
/// (attributes, calls, items, filters).
fn operand_at(source: &str, start: usize) -> Option<(Range<usize>, Range<usize>)> {
    let start = skip_space(source, start);
    let mut at = start;
    let mut bracket = None;
    loop {
        match source[at..].chars().next() {
            Some('(') if at == start => {
                at = bracket_end(source, at)?;
                bracket = Some(at);
            }
            Some('(' | '[') => at = bracket_end(source, at)?,
            Some('{') if at == start => at = bracket_end(source, at)?,
            Some('\'' | '"') if at == start => at = string_end(source, at),
            Some('-') if at == start => at += 1,
            Some(c) if c.is_alphanumeric() || c == '_' || c == '.' => at += c.len_utf8(),
            _ => {
                // A filter belongs to the operand.
                let filter = skip_space(source, at);
                if at > start && source[filter..].starts_with('|') {
                    at = skip_space(source, filter + 1);
                    continue;
                }
                break;
            }
        }
    }
    match bracket {
        Some(end) if end == at => Some((start..at, start + 1..at - 1)),
        _ => (at > start).then_some((start..at, start..at)),
    }
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
            ("{{ '%s items' % [1, 2]|length }}", "2 items"),
            ("{{ '%s' % (x ~ 'a').upper() }} {{ '%d' % -3 }}", "ÉA -3"),
            (
                "{% raw %}{{ '%s' % x }}{% generation %}{% endraw %}{# {% generation %} #}\
                 {{ '{% generation %}' }}",
                "{{ '%s' % x }}{% generation %}{% generation %}",
            ),
        ] {
            let (source, found) = rewrite(template);
            let rendered = environment.render_str(&source, minijinja::context! { x => "é" });
            assert_eq!(rendered.unwrap(), text, "{template}");
            assert!(!found);
        }
    }
}
