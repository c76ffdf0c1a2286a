//! Waits for NCCL and the GPU that also check the group.

use std::thread;
use std::time::{Duration, Instant};

use crate::error::CollectiveError;
use crate::group::Group;

/// How long a wait only yields the processor between two checks. Most waits are short.
const SPIN_DURATION: Duration = Duration::from_micros(100);
/// The first and the longest pause between two checks after that.
const FIRST_PAUSE: Duration = Duration::from_micros(20);
const LAST_PAUSE: Duration = Duration::from_millis(1);

/// How long after an error of NCCL the group is checked for a failed peer.
const PEER_ERROR_GRACE: Duration = Duration::from_secs(1);

/// Waits until `is_done` returns true.
///
/// # Errors
/// Those of `is_done` and [`Group::check`], and [`CollectiveError::DeviceTimeout`].
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

/// Ends the group after `error` and returns the error to report: the failure of a peer if a peer
/// caused `error`, otherwise `error`.
pub(super) fn attribute_error(group: &mut Group, error: CollectiveError) -> CollectiveError {
    let blamed = match error {
        // When a peer ends, its TCP connections and its NCCL connections fail, but not at the same
        // time.
        CollectiveError::Device { .. } => {
            let start = Instant::now();
            std::iter::repeat_with(|| group.check())
                .take_while(|_| start.elapsed() < PEER_ERROR_GRACE)
                .inspect(|_| thread::sleep(LAST_PAUSE))
                .find_map(Result::err)
        }
        // All ranks that time out get to this barrier. A rank that does not get here is the one
        // that hangs.
        CollectiveError::DeviceTimeout { .. } => group.barrier().err(),
        _ => None,
    };
    // This has no effect if an error of the group itself ended it.
    group.leave();
    blamed.unwrap_or(error)
}
