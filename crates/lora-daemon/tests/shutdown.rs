//! A test with real signals to this process. It must be the only test in this file.

use std::time::Duration;

use lora_daemon::shutdown::shutdown_signals;
use rustix::process::{Signal, getpid, kill_process};
use tokio::time::timeout;

const TEST_TIMEOUT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn the_first_signal_stops_gracefully_the_second_immediately() {
    let signals = shutdown_signals().unwrap();
    assert!(!signals.stop.is_cancelled());
    kill_process(getpid(), Signal::TERM).unwrap();
    timeout(TEST_TIMEOUT, signals.stop.cancelled()).await.unwrap();
    assert!(!signals.immediate.is_cancelled());
    kill_process(getpid(), Signal::INT).unwrap();
    timeout(TEST_TIMEOUT, signals.immediate.cancelled()).await.unwrap();
}
