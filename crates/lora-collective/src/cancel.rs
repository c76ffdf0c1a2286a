//! Cancellation of waits from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A token that cancels, from any thread, the formation and the operations of the group that was
/// given the token. They check it every few milliseconds. Clones share their state.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<CancelState>);

#[derive(Debug, Default)]
struct CancelState {
    cancelled: AtomicBool,
    waiting_for_peers: AtomicBool,
}

impl CancelToken {
    /// Creates a token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels permanently.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether [`Self::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// Whether a group is being formed with this token, or an operation of its group is in
    /// progress. A delay may then be caused by the peers as well as by this rank.
    pub fn is_waiting_for_peers(&self) -> bool {
        self.0.waiting_for_peers.load(Ordering::Relaxed)
    }

    /// Returns a guard; [`Self::is_waiting_for_peers`] is true until the guard is dropped.
    pub(crate) fn waiting(&self) -> WaitGuard {
        self.0.waiting_for_peers.store(true, Ordering::Relaxed);
        WaitGuard(self.clone())
    }
}

/// See [`CancelToken::waiting`].
pub(crate) struct WaitGuard(CancelToken);

impl Drop for WaitGuard {
    fn drop(&mut self) {
        self.0.0.waiting_for_peers.store(false, Ordering::Relaxed);
    }
}
