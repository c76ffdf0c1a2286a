//! The reasons why a call is refused, and their gRPC codes and details.

use std::collections::HashMap;
use std::time::Duration;

use lora_proto::v1::FileDigest;
use lora_spec::{FieldError, JobState};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::store::{StoreError, WatchError};

/// The domain of the reasons in error details.
const DOMAIN: &str = "lora.v1";
/// The largest number of characters in the text of a status.
const MAX_TEXT: usize = 1000;

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("job {0:?} does not exist")]
    UnknownJob(String),
    #[error("{0}")]
    Field(#[from] FieldError),
    #[error("these inputs are not in the store: {}; upload them first", listed(.0))]
    MissingInputs(Vec<FileDigest>),
    #[error(
        "idempotency_key: a job was submitted with this key before, as {job}, and {difference}; \
         use another key"
    )]
    KeyTaken { job: String, difference: String },
    #[error("job {job} is in generation {current}; generation {given} may not write to it")]
    StaleGeneration { job: String, given: u64, current: u64 },
    #[error("job {job} is {state} and accepts no files", state = state.name())]
    TakesNoFiles { job: String, state: JobState },
    #[error("job {job} is {state} and cannot be {wanted}", state = state.name())]
    NotPossible { job: String, state: JobState, wanted: &'static str },
    #[error(
        "the base is not in the store, so the job cannot be planned; upload the base, or use `loractl plan`"
    )]
    NoBase,
    #[error(
        "a worker named {0:?} is connected already; give this worker another name, or wait until the \
         connected one is gone"
    )]
    NameTaken(String),
    #[error("the file has {given}, not the announced {announced}")]
    Corrupt { announced: String, given: String },
    #[error("{size} bytes are more than the {limit} that a file may have (limits.upload_bytes)")]
    TooLarge { size: u64, limit: u64 },
    #[error("{0} does not exist")]
    NoFile(String),
    #[error("offset: {offset} is past the end of the file, which has {size} bytes")]
    PastEnd { offset: u64, size: u64 },
    #[error("event {asked} is no longer kept; the first one is {first}")]
    ForgottenEvents { asked: u64, first: u64 },
    #[error("step {asked} is no longer kept; the first one is {first}")]
    ForgottenSteps { asked: u64, first: u64 },
    #[error("{0}")]
    InvalidTransition(String),
    #[error("the store failed: {0}")]
    Store(#[from] StoreError),
    #[error("the coordinator is shutting down")]
    ShuttingDown,
}

impl Refusal {
    /// The gRPC code, and the reason for programs.
    fn kind(&self) -> (Code, &'static str) {
        match self {
            Self::UnknownJob(_) => (Code::NotFound, "UNKNOWN_JOB"),
            Self::NoFile(_) => (Code::NotFound, "UNKNOWN_FILE"),
            Self::Field(_) => (Code::InvalidArgument, "INVALID_FIELD"),
            Self::MissingInputs(_) => (Code::FailedPrecondition, "MISSING_INPUTS"),
            Self::KeyTaken { .. } => (Code::AlreadyExists, "IDEMPOTENCY_KEY_TAKEN"),
            Self::StaleGeneration { .. } => (Code::FailedPrecondition, "STALE_GENERATION"),
            Self::TakesNoFiles { .. } | Self::NotPossible { .. } | Self::InvalidTransition(_) => {
                (Code::FailedPrecondition, "WRONG_STATE")
            }
            Self::NoBase => (Code::FailedPrecondition, "BASE_NOT_UPLOADED"),
            Self::NameTaken(_) => (Code::AlreadyExists, "NAME_TAKEN"),
            Self::Corrupt { .. } => (Code::DataLoss, "DAMAGED"),
            Self::TooLarge { .. } => (Code::ResourceExhausted, "TOO_LARGE"),
            Self::PastEnd { .. } => (Code::OutOfRange, "PAST_END"),
            Self::ForgottenEvents { .. } => (Code::OutOfRange, "EVENTS_FORGOTTEN"),
            Self::ForgottenSteps { .. } => (Code::OutOfRange, "STEPS_FORGOTTEN"),
            Self::Store(_) => (Code::Internal, "STORE"),
            Self::ShuttingDown => (Code::Unavailable, "SHUTTING_DOWN"),
        }
    }

    /// Metadata of the reason: numbers that a program needs for its next call.
    fn metadata(&self) -> HashMap<String, String> {
        let first = match self {
            Self::ForgottenEvents { first, .. } | Self::ForgottenSteps { first, .. } => {
                Some(first.to_string())
            }
            _ => None,
        };
        first.map(|first| ("first".to_owned(), first)).into_iter().collect()
    }

    /// The refusal for an error of a watch of the job `job_id`.
    pub(crate) fn from_watch_error(error: WatchError, job_id: &str) -> Self {
        match error {
            WatchError::UnknownJob => Self::UnknownJob(job_id.to_owned()),
            WatchError::ForgottenEvents { asked, first } => Self::ForgottenEvents { asked, first },
            WatchError::ForgottenSteps { asked, first } => Self::ForgottenSteps { asked, first },
            WatchError::Store(error) => Self::Store(error),
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let (code, reason) = refusal.kind();
        let mut details = ErrorDetails::new();
        details.set_error_info(reason, DOMAIN, refusal.metadata());
        match &refusal {
            Refusal::Field(error) => {
                details.add_bad_request_violation(shortened(&error.field), shortened(&error.message));
            }
            Refusal::KeyTaken { job, difference } => {
                let text = format!(
                    "a job was submitted with this key before, as {job}, and {difference}; use another key"
                );
                details.add_bad_request_violation("idempotency_key", shortened(&text));
            }
            Refusal::PastEnd { .. } => {
                details.add_bad_request_violation("offset", refusal.to_string());
            }
            Refusal::NameTaken(_) | Refusal::ShuttingDown => {
                details.set_retry_info(Some(Duration::from_secs(2)));
            }
            Refusal::Store(error) => tracing::error!(error = %error, "the store failed"),
            _ => {}
        }
        Self::with_error_details(code, shortened(&refusal.to_string()), details)
    }
}

/// The first [`MAX_TEXT`] characters of `text`. A status is sent in headers, whose size is limited,
/// and an error may quote a long value of the request.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn listed(files: &[FileDigest]) -> String {
    const MAX_SHOWN: usize = 3;
    let mut text: Vec<String> = files.iter().take(MAX_SHOWN).map(FileDigest::hex).collect();
    if files.len() > MAX_SHOWN {
        text.push(format!("and {} more", files.len() - MAX_SHOWN));
    }
    text.join(", ")
}
