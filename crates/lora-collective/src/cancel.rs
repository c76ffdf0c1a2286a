//! Giving a wait up from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Ends, from any thread, what was given this token: the forming of a group and the operations of a group, which look at
/// it every few milliseconds, and whatever else looks at it. Clones are one and the same token.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<CancelState>);

#[derive(Debug, Default)]
struct CancelState {
    cancelled: AtomicBool,
    waiting_for_peers: AtomicBool,
}

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels, for good.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether [`Self::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// Whether a group is being formed with this token, or an operation of its group is under way: time that passes is the
    /// peers' as much as this rank's.
    pub fn is_waiting_for_peers(&self) -> bool {
        self.0.waiting_for_peers.load(Ordering::Relaxed)
    }

    /// Says so until it is dropped.
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
