//! Pauses between attempts at what may work later.

use std::time::Duration;

use backon::ExponentialBuilder;

const INITIAL_DELAY: Duration = Duration::from_millis(100);
/// Jitter adds up to as much again.
const MAX_DELAY: Duration = Duration::from_millis(2500);

/// Longer and longer pauses, without an end.
pub(crate) fn backoff() -> ExponentialBuilder {
    ExponentialBuilder::new()
        .with_min_delay(INITIAL_DELAY)
        .with_max_delay(MAX_DELAY)
        .with_factor(2.0)
        .with_jitter()
        .without_max_times()
}
