//! The validation of a job before it gets workers: its plan, from the uploaded inputs.

use lora_collective::tree::all_reduce_bytes;
use lora_plan::{MemoryRequirements, Plan, PlanError, TooLarge};
use lora_proto::v1;
use lora_spec::{DeviceMemory, FieldError, JobSpec};

use crate::admission::inputs::JobInputs;
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
    #[error("cannot link the inputs: {0}")]
    Io(#[from] std::io::Error),
}

/// Plans the job from its stored inputs. Blocks.
pub(crate) fn plan(store: &Store, job: &JobSpec, inputs: &v1::Inputs) -> Result<Plan, PlanFailure> {
    let linked = JobInputs::new(store, job, inputs)?.ok_or(PlanFailure::NoBase)?;
    let mut plan = Plan::new(&linked.job).map_err(|error| match error {
        PlanError::Field(error) => {
            FieldError::new(&error.field, linked.with_job_names(&error.message)).into()
        }
        other => PlanFailure::Content(linked.with_job_names(&other.to_string())),
    })?;
    for text in plan.notes.iter_mut().chain(&mut plan.problems) {
        *text = linked.with_job_names(text);
    }
    Ok(plan)
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
pub(crate) fn check(store: &Store, job: &JobSpec, inputs: &v1::Inputs) -> std::io::Result<ValidationOutcome> {
    let plan = match plan(store, job, inputs) {
        Ok(plan) => plan,
        Err(PlanFailure::NoBase) => return Ok(ValidationOutcome::Valid(None)),
        Err(PlanFailure::Io(error)) => return Err(error),
        Err(error) => return Ok(ValidationOutcome::Problem(error.to_string())),
    };
    if !plan.problems.is_empty() {
        let mut text = plan.problems.iter().take(SHOWN_PROBLEMS).cloned().collect::<Vec<_>>().join("\n");
        if plan.problems.len() > SHOWN_PROBLEMS {
            text += &format!("\nand {} more", plan.problems.len() - SHOWN_PROBLEMS);
        }
        return Ok(ValidationOutcome::Problem(text));
    }
    if job.workers.max > plan.micro_batches {
        return Ok(ValidationOutcome::Problem(format!(
            "workers.max: {} workers are more than the {} micro-batches that the rows make",
            job.workers.max, plan.micro_batches
        )));
    }
    Ok(ValidationOutcome::Valid(Some(Box::new(plan.requirements))))
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
    let workers = job.workers.max.min(plan.micro_batches);
    let gradient_bytes = 4 * plan.trainable_parameters;
    let all_reduce_bytes = all_reduce_bytes(plan.micro_batches, workers, gradient_bytes).unwrap_or(0);
    v1::PlanJobResponse { all_reduce_bytes, ..plan.into() }
}
