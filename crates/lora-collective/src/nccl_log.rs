//! The destination of NCCL's log.

/// Returns NCCL's variable, with its value, that sends the log to stderr, for a process whose
/// stderr is a pipe. Returns `None` if `is_set` returns that the environment has the variable.
///
/// By default NCCL writes to stdout, in blocks that end in the middle of a line, and a process that
/// is killed loses the last block. NCCL truncates the file that it opens, which has no effect on a
/// pipe.
pub fn nccl_log_variable(is_set: impl Fn(&str) -> bool) -> Option<(&'static str, &'static str)> {
    let variable = ("NCCL_DEBUG_FILE", "/dev/stderr");
    (!is_set(variable.0)).then_some(variable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_file_set_by_the_user_is_kept() {
        assert_eq!(nccl_log_variable(|_| false), Some(("NCCL_DEBUG_FILE", "/dev/stderr")));
        assert_eq!(nccl_log_variable(|name| name == "NCCL_DEBUG_FILE"), None);
    }
}
