//! Giving a wait up from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Ends, from any thread, what was given this token: the forming of a group and the operations of a group, which look at
/// it every few milliseconds, and whatever else looks at it. Clones are one and the same token.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    cancelled: AtomicBool,
    waited_with: AtomicBool,
}

impl Cancel {
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
    pub fn is_waited_with(&self) -> bool {
        self.0.waited_with.load(Ordering::Relaxed)
    }

    /// Says so until it is dropped.
    pub(crate) fn waiting(&self) -> Waiting {
        self.0.waited_with.store(true, Ordering::Relaxed);
        Waiting(self.clone())
    }
}

/// See [`Cancel::waiting`].
pub(crate) struct Waiting(Cancel);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.waited_with.store(false, Ordering::Relaxed);
    }
}
