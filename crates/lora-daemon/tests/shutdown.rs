//! Real signals to this process, so there is one test alone.

use std::time::Duration;

use lora_daemon::shutdown::signals;
use rustix::process::{Signal, getpid, kill_process};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn the_first_signal_asks_to_stop_and_the_second_to_end_at_once() {
    let signals = signals().unwrap();
    assert!(!signals.stop.is_cancelled());
    kill_process(getpid(), Signal::TERM).unwrap();
    timeout(LIMIT, signals.stop.cancelled()).await.unwrap();
    assert!(!signals.at_once.is_cancelled());
    kill_process(getpid(), Signal::INT).unwrap();
    timeout(LIMIT, signals.at_once.cancelled()).await.unwrap();
}
