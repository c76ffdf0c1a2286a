//! The phases of a job's group, and what follows a group.

use lora_proto::v1::job_event;
use tokio::time::Instant;

use crate::store::MemberRow;

/// What the group of a job does. The state of the job, which users see, is in its row. A phase is
/// in memory only: after a restart, the state and the reports of the workers lead to it again.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum GroupPhase {
    /// The job has no group: it waits for its first one, or workers must not hold it.
    Absent,
    /// The members load the job.
    Forming,
    /// The members train, or enter training.
    Training,
    /// The members stop at a step boundary, so that the group can change.
    Stopping {
        /// The reason, as text for users.
        reason: String,
    },
    /// The members have stopped. One of them uploads its state, which is newer than the store's.
    Saving {
        /// The worker that saves.
        by: String,
        /// What follows.
        then: AfterSave,
    },
    /// A member is gone, or reported that the group broke. The others have a moment to report it
    /// too.
    Broken {
        /// The time when this was first seen.
        since: Instant,
        /// The reason for which the members were stopping already, if they were.
        stopping: Option<String>,
    },
    /// The group has ended. The scheduler forms another one, or the job waits for members.
    Regrouping(Regroup),
    /// The job waits for members, and those that may have its state are disconnected. Another group
    /// is formed when they are back or lost.
    Reconnecting(Regroup),
}

/// What follows when the newest state is in the store.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum AfterSave {
    /// Another group replaces this one, for this reason.
    Regroup(String),
    /// The job is paused.
    Pause,
    /// Members leave the job, which waits for others.
    Wait(Regroup),
}

/// How another group follows one that has ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Regroup {
    /// The reason, as text for users; empty for the first group of a job.
    pub(crate) reason: String,
    /// The members that stay.
    pub(crate) remaining: Vec<MemberRow>,
    /// The events to record with the new group.
    pub(crate) events: Vec<job_event::Kind>,
    /// Whether the group broke; `false` if the change was planned.
    pub(crate) is_failure: bool,
}

impl GroupPhase {
    /// The reason for which the members stop, or have stopped; `None` if they need not.
    pub(crate) fn stop_reason(&self) -> Option<&str> {
        match self {
            Self::Stopping { reason } | Self::Saving { then: AfterSave::Regroup(reason), .. } => Some(reason),
            Self::Broken { stopping, .. } => stopping.as_deref(),
            _ => None,
        }
    }

    /// How another group follows, for a job that waits for members.
    pub(crate) fn waiting(&self) -> Option<&Regroup> {
        match self {
            Self::Regrouping(regroup)
            | Self::Reconnecting(regroup)
            | Self::Saving { then: AfterSave::Wait(regroup), .. } => Some(regroup),
            _ => None,
        }
    }

    /// The group that can follow now; `None` while a group works, or while a state is being saved
    /// that the next group would not have.
    pub(crate) fn regroup(&self) -> Option<&Regroup> {
        match self {
            Self::Regrouping(regroup) => Some(regroup),
            _ => None,
        }
    }
}
