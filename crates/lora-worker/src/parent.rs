//! Ending with the process that started this one.

use std::io::{self, Read};

use tokio_util::sync::CancellationToken;

/// Cancels `at_once` when stdin ends: the parent, which holds its other end, closes it or dies. The thread that waits for it
/// ends with the process.
///
/// # Errors
/// The thread cannot be started.
pub fn end_with_stdin(at_once: CancellationToken) -> io::Result<()> {
    let watch = move || {
        let mut byte = [0];
        while matches!(io::stdin().read(&mut byte), Ok(1..)) {}
        at_once.cancel();
    };
    std::thread::Builder::new().name("parent".into()).spawn(watch)?;
    Ok(())
}
