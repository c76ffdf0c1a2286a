//! Conditions that are always true in Jinja, because their filter gives a generator.

use super::source::{Tag, tags, without_strings};

/// Filters that give generators in Jinja, and lists in minijinja.
const FILTERS: [&str; 5] = ["map", "select", "reject", "selectattr", "rejectattr"];

/// Checks that no condition is the result of such a filter: it is true in Jinja also if there are
/// no items.
///
/// # Errors
/// Names the filter.
pub(crate) fn check_conditions(source: &str) -> Result<(), String> {
    for Tag { inside, is_block } in tags(source) {
        let code = without_strings(source[inside].trim_matches(['-', '+']));
        let mut words = code.split_whitespace();
        if !is_block || !matches!(words.next(), Some("if" | "elif")) {
            continue;
        }
        let last = code.rsplit('|').next().filter(|_| code.contains('|')).unwrap_or_default().trim();
        let name = last.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
        let rest = last[name.len()..].trim();
        let is_whole = rest.is_empty() || (rest.starts_with('(') && rest.find(')') == Some(rest.len() - 1));
        if FILTERS.contains(&name) && is_whole {
            return Err(format!(
                "a condition on the filter {name} is true in Jinja also without items; write | list after it"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_on_generators_are_refused() {
        for accepted in [
            "{% if messages | selectattr('role', 'equalto', 'tool') | list %}a{% endif %}",
            "{% if (messages | map(attribute='role') | first) == 'user' %}a{% endif %}",
            "{% for m in messages | selectattr('a') %}{% endfor %}",
            "{% if x is mapping %}{{ x | map('upper') | join }}{% endif %}",
            "{% set a = messages | select %}{% if ' | select' in x %}{% endif %}",
        ] {
            assert_eq!(check_conditions(accepted), Ok(()), "{accepted}");
        }
        for refused in [
            "{% if messages | selectattr('role', 'equalto', 'tool') %}a{% endif %}",
            "{%- elif x|select -%}",
            "{% if not x | map('upper') %}{% endif %}",
        ] {
            assert!(check_conditions(refused).is_err(), "{refused}");
        }
    }
}
