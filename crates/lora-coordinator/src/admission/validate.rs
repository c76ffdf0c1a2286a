//! The validation of a job before it gets workers: its plan, from the uploaded inputs.

use lora_plan::{MemoryRequirements, Plan, PlanError, TooLarge};
use lora_proto::v1;
use lora_spec::{DeviceMemory, FieldError, JobSpec};

use crate::admission::inputs::job_files;
use crate::store::Store;

/// The largest number of problems of a dataset in an error; users fix the first ones first.
const SHOWN_PROBLEMS: usize = 20;

/// Why a job cannot be planned.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanFailure {
    /// The base is not in the store. The workers fetch it, and check the job with it.
    #[error("the base is not in the store")]
    NoBase,
    #[error(transparent)]
    Field(#[from] FieldError),
    /// All problems of the base or the data, in one text.
    #[error("{0}")]
    Content(String),
}

/// Plans the job from its stored inputs. Blocks.
pub(crate) fn plan(store: &Store, job: &JobSpec, inputs: &v1::Inputs) -> Result<Plan, PlanFailure> {
    let files = job_files(store, job, inputs).ok_or(PlanFailure::NoBase)?;
    Plan::new(job, &files).map_err(|error| match error {
        PlanError::Field(error) => error.into(),
        other => PlanFailure::Content(other.to_string()),
    })
}

/// The result of the validation of a job's inputs.
#[derive(Debug)]
pub(crate) enum ValidationOutcome {
    /// The reason why the job would fail.
    Problem(String),
    /// The job is valid and needs this memory. `None`: the base is not in the store, so the memory
    /// is not known.
    Valid(Option<Box<MemoryRequirements>>),
}

/// Validates a job's inputs. Blocks.
pub(crate) fn check(store: &Store, job: &JobSpec, inputs: &v1::Inputs) -> ValidationOutcome {
    let plan = match plan(store, job, inputs) {
        Ok(plan) => plan,
        Err(PlanFailure::NoBase) => return ValidationOutcome::Valid(None),
        Err(error) => return ValidationOutcome::Problem(error.to_string()),
    };
    if !plan.problems.is_empty() {
        let mut text = plan.problems.iter().take(SHOWN_PROBLEMS).cloned().collect::<Vec<_>>().join("\n");
        if plan.problems.len() > SHOWN_PROBLEMS {
            text += &format!("\nand {} more", plan.problems.len() - SHOWN_PROBLEMS);
        }
        return ValidationOutcome::Problem(text);
    }
    if let Err(error) = plan.check_workers(job.workers.max) {
        return ValidationOutcome::Problem(error.to_string());
    }
    ValidationOutcome::Valid(Some(Box::new(plan.requirements)))
}

/// Checks that the job fits any of the workers with these memories, if there are workers.
///
/// # Errors
/// The job fits none of them. The error is about the largest memory.
pub(crate) fn fits_any(requirements: &MemoryRequirements, workers: &[DeviceMemory]) -> Result<(), TooLarge> {
    let Some(largest) = workers.iter().max() else { return Ok(()) };
    if workers.iter().any(|memory| requirements.fits(*memory).is_ok()) {
        return Ok(());
    }
    requirements.fits(*largest)
}

/// Creates the answer with the plan of `job`.
pub(crate) fn plan_response(plan: Plan, job: &JobSpec) -> v1::PlanJobResponse {
    let all_reduce_bytes = plan.all_reduce_bytes(job.workers.max);
    v1::PlanJobResponse { all_reduce_bytes, ..plan.into() }
}
