//! Pauses between attempts at what may work later.

use std::time::Duration;

use backon::ExponentialBuilder;

const FIRST: Duration = Duration::from_millis(100);
/// Jitter adds up to as much again.
const LAST: Duration = Duration::from_millis(2500);

/// Longer and longer pauses, without an end.
pub(crate) fn backoff() -> ExponentialBuilder {
    ExponentialBuilder::new()
        .with_min_delay(FIRST)
        .with_max_delay(LAST)
        .with_factor(2.0)
        .with_jitter()
        .without_max_times()
}
