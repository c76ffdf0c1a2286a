//! Ending with the process that started this one.

use std::io::{self, Read};

/// Calls `end` when stdin ends: the parent, which holds its other end, closes it or dies. The thread that waits for it ends
/// with the process.
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
