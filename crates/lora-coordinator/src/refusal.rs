//! Why a call is refused, mapped once to gRPC's codes.

use lora_spec::{FieldError, JobState};
use tonic::{Code, Status};

use crate::output_dir::OutputError;

/// Why the service refuses a call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("there is no job {0:?}")]
    UnknownJob(String),
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error("job {job} is in generation {current}; generation {given} may not write to it any more")]
    StaleGeneration { job: String, given: u64, current: u64 },
    #[error("job {job} is {state}: it takes no files", state = state.name())]
    NotRunning { job: String, state: JobState },
    #[error("job {job} has {state} and cannot be paused", state = state.name())]
    AlreadyOver { job: String, state: JobState },
    #[error("a worker named {0:?} is connected; give this one another name")]
    NameTaken(String),
    #[error("the file has {given}, not the announced {announced}")]
    Damaged { announced: String, given: String },
    #[error("the coordinator is shutting down")]
    ShuttingDown,
}

impl Refusal {
    fn code(&self) -> Code {
        match self {
            Self::UnknownJob(_) => Code::NotFound,
            Self::Field(_) => Code::InvalidArgument,
            Self::Output(OutputError::Io { .. }) => Code::Internal,
            Self::Output(_)
            | Self::StaleGeneration { .. }
            | Self::NotRunning { .. }
            | Self::AlreadyOver { .. } => Code::FailedPrecondition,
            Self::NameTaken(_) => Code::AlreadyExists,
            Self::Damaged { .. } => Code::DataLoss,
            Self::ShuttingDown => Code::Unavailable,
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Status::new(refusal.code(), refusal.to_string())
    }
}
