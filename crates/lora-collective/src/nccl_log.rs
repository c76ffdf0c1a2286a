//! Where NCCL writes its log.

/// NCCL's variable, with its value, with which the log of a process whose stderr is a pipe goes there;
/// `None` if `is_set` returns that the environment has the variable.
///
/// NCCL writes to stdout by default, in blocks that end in the middle of a line, and a process that is
/// killed loses the last one. NCCL truncates the file that it opens, which only leaves a pipe as it is.
pub fn nccl_log_variable(is_set: impl Fn(&str) -> bool) -> Option<(&'static str, &'static str)> {
    let variable = ("NCCL_DEBUG_FILE", "/dev/stderr");
    (!is_set(variable.0)).then_some(variable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_the_user_chose_stays() {
        assert_eq!(nccl_log_variable(|_| false), Some(("NCCL_DEBUG_FILE", "/dev/stderr")));
        assert_eq!(nccl_log_variable(|name| name == "NCCL_DEBUG_FILE"), None);
    }
}
