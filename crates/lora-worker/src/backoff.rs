//! Pauses between attempts of an operation that may succeed later.

use std::time::Duration;

use backon::ExponentialBuilder;

const INITIAL_DELAY: Duration = Duration::from_millis(100);
/// The longest pause without jitter. Jitter adds up to the same time again.
const MAX_DELAY: Duration = Duration::from_millis(2500);

/// Exponentially growing pauses, without a limit of attempts.
pub(crate) fn backoff() -> ExponentialBuilder {
    ExponentialBuilder::new()
        .with_min_delay(INITIAL_DELAY)
        .with_max_delay(MAX_DELAY)
        .with_factor(2.0)
        .with_jitter()
        .without_max_times()
}
