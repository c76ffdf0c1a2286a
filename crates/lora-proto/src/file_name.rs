//! The names of files in messages.

/// Maximum length of a file name, in bytes.
pub const MAX_NAME_BYTES: usize = 255;

/// Maximum length of the name of a file of a job's result, in bytes.
pub const MAX_RESULT_NAME_BYTES: usize = 128;

/// Whether a file name may contain `c`: ASCII letters, digits, `-`, `_` and `.`.
pub fn is_file_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_.".contains(c)
}

/// Whether `name` is a file name of at most [`MAX_NAME_BYTES`] that does not start with a dot.
///
/// Such a name is a file in the directory that it is joined to, on every file system.
pub fn is_file_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && !name.starts_with('.')
        && name.chars().all(is_file_name_char)
}

/// Checks that `name` is a file name ([`is_file_name`]).
///
/// # Errors
/// Why not, and what would be right.
pub fn check_file_name(name: &str) -> Result<(), String> {
    if is_file_name(name) {
        return Ok(());
    }
    // The name may be long.
    let shown: String = name.chars().take(64).collect();
    Err(format!(
        "{shown:?} is not a file name; it must be 1 to {MAX_NAME_BYTES} letters, digits, `-`, `_` and `.`, \
         and not start with a dot"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_directory() {
        for name in ["", ".", "..", "../x", "a/b", "/x", ".hidden", "a\\b", "a\0b", "ä", "a b", "a\nb"] {
            assert!(!is_file_name(name), "{name:?}");
        }
        assert!(is_file_name("model-00001-of-00002.safetensors") && is_file_name("a..b"));
        assert!(is_file_name(&"x".repeat(255)) && !is_file_name(&"x".repeat(256)));
    }
}
