//! Texts that Jinja marks as safe. What is added to such a text is escaped in Jinja, and not in
//! minijinja; where it is printed, both are the same.

use super::source::{Tag, tags, without_strings};

/// The filters whose results are safe texts.
const FILTERS: [&str; 5] = ["safe", "escape", "e", "forceescape", "xmlattr"];

/// Checks that nothing is added to a safe text, and that it has no further filters and methods. The
/// text may be printed, joined with `~`, compared, and given a name.
///
/// # Errors
/// Names the filter or the variable.
pub(crate) fn check_safe_texts(source: &str) -> Result<(), String> {
    let tags: Vec<String> = tags(source).iter().map(|tag| code_of(source, tag)).collect();
    let mut safe = Vec::new();
    for code in &tags {
        for name in FILTERS {
            let mut uses = filters(code, name).peekable();
            if uses.peek().is_none() {
                continue;
            }
            if adds(code) || uses.any(is_used_further) {
                return Err(refusal(&format!("the filter {name}")));
            }
            safe.extend(assigned(code));
        }
    }
    for code in tags.iter().filter(|code| adds(code)) {
        if let Some(variable) = safe.iter().find(|variable| words(code).any(|word| word == **variable)) {
            return Err(refusal(&format!("the safe text {variable}")));
        }
    }
    Ok(())
}

fn refusal(what: &str) -> String {
    format!(
        "{what} is not supported with + or %, methods or other filters: Jinja escapes what it is joined with"
    )
}

/// Whether a tag has the operator `+` or `%`.
fn adds(code: &str) -> bool {
    code.contains(['+', '%'])
}

/// The code after each use of a filter.
fn filters<'a>(code: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    code.split('|').skip(1).filter_map(move |part| {
        let rest = part.trim_start().strip_prefix(name)?;
        let is_whole = !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_');
        // The part ends at the next filter.
        let at = rest.as_ptr().addr() - code.as_ptr().addr();
        is_whole.then(|| &code[at..])
    })
}

/// Whether a filter or a method follows.
fn is_used_further(after: &str) -> bool {
    after.trim_start().trim_start_matches([')', ' ']).starts_with(['|', '.', '['])
}

/// The variable that a tag sets.
fn assigned(code: &str) -> Option<String> {
    let (name, _) = code.trim_start().strip_prefix("set ")?.split_once('=')?;
    Some(name.rsplit('.').next().unwrap_or(name).trim().to_owned())
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// The code of a tag without its strings, and without the signs that trim white space.
fn code_of(source: &str, tag: &Tag) -> String {
    without_strings(source[tag.inside.clone()].trim_matches(['-', '+']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn safe_texts_may_only_be_printed() {
        for accepted in [
            "{{ x | safe }}",
            "{{- x|tojson|safe -}}",
            "{{ a ~ x|e }}",
            "{{ 'a + b' ~ x | escape }}",
            "<a{{ x|xmlattr }}>",
            "{{ x + y }}{{ x|safely }}{# x|safe + y #}",
            "{{ ('a' + x) | trim }}",
            "{{ '|safe' + x }}",
            "{{- '<' ~ (x | tojson | safe) ~ '>' -}}",
            "{%- set y = x|tojson|safe if x is mapping else x|string -%}{{ y ~ z }}{{ z + 'a' }}",
        ] {
            assert_eq!(check_safe_texts(accepted), Ok(()), "{accepted}");
        }
        for refused in [
            "{{ x|safe + y }}",
            "{{ 'a' + x | e }}",
            "{{ (x|safe).replace('a', 'b') }}",
            "{% set y = x|safe %}{{ y + 'a' }}",
            "{% set n.y = x|safe %}{{ 'a' + n.y }}",
            "{{ x|safe|replace('a', 'b') }}",
            "{{ '%s'|safe % x }}",
            "{{ x|safe ~ (y|e).replace('a', 'b') }}",
            "{% set y = 'a' + x|e %}",
        ] {
            assert!(check_safe_texts(refused).is_err(), "{refused}");
        }
    }
}
