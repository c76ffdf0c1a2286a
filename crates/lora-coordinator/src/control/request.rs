//! Decides what a user's request does to a job: a pure function of the job's state.

use lora_spec::JobState;

use super::action::Action;

/// A request that needs no settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    Cancel,
    Pause,
    Resume,
}

/// What a request does.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    /// The job is already what the request asks for, or becomes it.
    Nothing,
    Apply(Action),
    /// The settings of the job are checked, then it continues.
    Resume,
    /// The state does not allow the request.
    Refuse,
}

impl Request {
    /// What the job becomes, for the text of a refusal.
    pub(crate) fn wanted(self) -> &'static str {
        match self {
            Self::Cancel => "cancelled",
            Self::Pause => "paused",
            Self::Resume => "resumed",
        }
    }

    /// What the request does to a job in this state.
    pub(crate) fn answer(self, state: JobState) -> Answer {
        use JobState::{
            Cancelled, Cancelling, Failed, Paused, Pausing, Preparing, Queued, Recovering, Running,
            Succeeded, Validating, Waiting,
        };
        match (self, state) {
            (Self::Cancel, Cancelled | Cancelling) | (Self::Pause, Paused | Pausing) => Answer::Nothing,
            (Self::Cancel, Validating | Queued | Paused | Failed) => Answer::Apply(Action::Cancel),
            (Self::Cancel, Preparing | Running | Recovering | Waiting | Pausing) => {
                Answer::Apply(Action::StartCancel)
            }
            (Self::Pause, Validating | Queued) => Answer::Apply(Action::Pause),
            (Self::Pause, Preparing | Running | Recovering | Waiting) => Answer::Apply(Action::StartPause),
            (Self::Resume, Paused | Failed) => Answer::Resume,
            (Self::Resume, Validating | Queued | Preparing | Running | Recovering | Waiting) => {
                Answer::Nothing
            }
            (Self::Cancel, Succeeded)
            | (Self::Pause, Cancelling | Cancelled | Succeeded | Failed)
            | (Self::Resume, Cancelling | Pausing | Cancelled | Succeeded) => Answer::Refuse,
        }
    }
}
