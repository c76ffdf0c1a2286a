//! Waiting for NCCL and for the GPU, with an eye on the group.

use std::thread;
use std::time::{Duration, Instant};

use crate::error::CollectiveError;
use crate::group::Group;

/// As long as this the processor is only offered to others between two looks: most waits are short.
const SPIN_DURATION: Duration = Duration::from_micros(100);
/// Pauses between two looks after that.
const FIRST_PAUSE: Duration = Duration::from_micros(20);
const LAST_PAUSE: Duration = Duration::from_millis(1);

/// How long after an error of NCCL a peer may take to show that it is to blame.
const PEER_ERROR_GRACE: Duration = Duration::from_secs(1);

/// Waits until `is_done`.
///
/// # Errors
/// That of `is_done`; those of [`Group::check`]; [`CollectiveError::DeviceTimeout`].
pub(super) fn wait(
    group: &mut Group,
    action: &'static str,
    timeout: Duration,
    mut is_done: impl FnMut() -> Result<bool, CollectiveError>,
) -> Result<(), CollectiveError> {
    let cancel = group.cancel_token().clone();
    let _waiting = cancel.waiting();
    let start = Instant::now();
    let mut pause = FIRST_PAUSE;
    while !is_done()? {
        group.check()?;
        if start.elapsed() >= timeout {
            return Err(CollectiveError::DeviceTimeout { action, timeout });
        }
        if start.elapsed() < SPIN_DURATION {
            thread::yield_now();
            continue;
        }
        thread::sleep(pause);
        pause = (2 * pause).min(LAST_PAUSE);
    }
    Ok(())
}

/// Ends the group after `error`, and says what to report: where a peer is to blame, that.
pub(super) fn attribute_error(group: &mut Group, error: CollectiveError) -> CollectiveError {
    let blamed = match error {
        // A peer's end breaks its connections of both kinds, but not at the same moment.
        CollectiveError::Device { .. } => {
            let start = Instant::now();
            std::iter::repeat_with(|| group.check())
                .take_while(|_| start.elapsed() < PEER_ERROR_GRACE)
                .inspect(|_| thread::sleep(LAST_PAUSE))
                .find_map(Result::err)
        }
        // Ranks that wait in vain are here all together. Who does not come is the one that hangs.
        CollectiveError::DeviceTimeout { .. } => group.barrier().err(),
        _ => None,
    };
    // Without effect where an error of the group's own ended it.
    group.leave();
    blamed.unwrap_or(error)
}
