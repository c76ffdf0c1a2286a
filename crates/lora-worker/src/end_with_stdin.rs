//! Ends a process together with the process that started it.

use std::io::{self, Read};

/// Calls `end` when stdin ends. That happens when the parent process, which holds the other end of
/// the pipe, closes it or dies. The waiting thread ends with the process.
///
/// # Errors
/// The thread cannot be started.
pub fn end_with_stdin(end: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let watch = move || {
        let mut byte = [0];
        while matches!(io::stdin().read(&mut byte), Ok(1..)) {}
        end();
    };
    std::thread::Builder::new().name("parent".into()).spawn(watch)?;
    Ok(())
}
