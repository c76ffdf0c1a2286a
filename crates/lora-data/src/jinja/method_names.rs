//! Names of a dict's methods that a template reads without a call.

use std::collections::BTreeSet;

use super::source::{Tag, string_end, tags};

/// Methods of dicts that keys of JSON may be named like.
const METHODS: [&str; 3] = ["items", "keys", "values"];

/// Checks that the template calls methods of dicts: in Jinja `schema.items` is the method, also if
/// the dict has the key, and minijinja gives the value of the key.
///
/// # Errors
/// A method is read without a call, and not from a namespace.
pub(crate) fn check_method_names(source: &str) -> Result<(), String> {
    let mut namespaces = BTreeSet::new();
    for Tag { inside, is_block } in tags(source) {
        let code = without_strings(&source[inside]);
        if is_block
            && let Some((target, value)) = code.split_once('=')
            && value.trim_start().starts_with("namespace")
        {
            namespaces.extend(target.split_whitespace().last().map(str::to_owned));
        }
        for (i, piece) in code.match_indices('.') {
            let after = code[i + piece.len()..].trim_start();
            let is_part = |c: char| c.is_alphanumeric() || c == '_';
            let end = after.find(|c| !is_part(c)).unwrap_or(after.len());
            let (name, rest) = after.split_at(end);
            if !METHODS.contains(&name) || rest.trim_start().starts_with('(') {
                continue;
            }
            let before = code[..i].trim_end();
            let start = before.rfind(|c| !is_part(c)).map_or(0, |at| at + 1);
            let start = start.min(before.len());
            let object = before.get(start..).unwrap_or_default();
            if !namespaces.contains(object) {
                return Err(format!(
                    "`{object}.{name}` is a method of Python's dicts, and is not called; write \
                     `{object}['{name}']` for a key, or `{object}.{name}()`"
                ));
            }
        }
    }
    Ok(())
}

/// The code of a tag, its strings empty.
fn without_strings(code: &str) -> String {
    let mut out = String::new();
    let mut at = 0;
    while let Some(c) = code[at..].chars().next() {
        at = match c {
            '\'' | '"' => {
                out.push_str("''");
                string_end(code, at)
            }
            c => {
                out.push(c);
                at + c.len_utf8()
            }
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_of_dicts_must_be_called() {
        for source in [
            "{{ d.items() }}{{ d.keys () }}{{ d['items'] }}{{ d.itemsize }}",
            "{{ 'd.items' }} d.items {# d.items #}{% raw %}{{ d.items }}{% endraw %}",
            "{% set ns = namespace(items=[]) %}{% set ns.items = [1] %}{{ ns.items }}",
        ] {
            assert_eq!(check_method_names(source), Ok(()), "{source}");
        }
        for source in ["{% if d.items %}{% endif %}", "{{ d . values }}", "{{ é.d['x'].keys }}"] {
            let error = check_method_names(source).unwrap_err();
            assert!(error.contains("is a method of Python's dicts, and is not called"), "{error}");
        }
    }
}
