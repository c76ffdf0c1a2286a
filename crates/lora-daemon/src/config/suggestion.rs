//! Error messages for unknown keys, with a suggestion.

/// Similarity above which a known key is suggested.
const SIMILARITY_THRESHOLD: f64 = 0.8;

/// Returns the error message for `key`, which is not one of `known`. `key_as_written` spells a key
/// as in the source in which `key` was set.
pub(super) fn unknown_key_message(
    key: &str,
    known: &[String],
    key_as_written: impl Fn(&str) -> String,
) -> String {
    let within = |section: &str| {
        let inside = known.iter().filter(|k| k.strip_prefix(section).is_some_and(|k| k.starts_with('.')));
        inside.map(|k| key_as_written(k)).collect::<Vec<_>>()
    };
    let inside = within(key);
    if !inside.is_empty() {
        return format!("is a section; its settings: {}", inside.join(", "));
    }
    // Sections share names such as `listen`, and a setting may have been written into the wrong
    // section.
    let alike = |k: &&String| {
        (strsim::jaro_winkler(name(k), name(key)), strsim::normalized_damerau_levenshtein(k, key))
    };
    let nearest = known
        .iter()
        .map(|k| (alike(&k), k))
        .filter(|((name, whole), _)| name.max(*whole) > SIMILARITY_THRESHOLD);
    match nearest.max_by(|(a, _), (b, _)| (a.0 + a.1).total_cmp(&(b.0 + b.1))) {
        Some((_, nearest)) => format!("is not a setting; did you mean {}?", key_as_written(nearest)),
        None => {
            let section = key.rsplit_once('.').map_or("", |(section, _)| section);
            let mut settings = within(section);
            if settings.is_empty() {
                settings = known.iter().map(|k| key_as_written(k)).collect();
            }
            format!("is not a setting; known settings: {}", settings.join(", "))
        }
    }
}

/// Returns the last part of a dotted key.
fn name(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or_default()
}
