//! The validation of a job before it gets workers: its plan, from the uploaded inputs.

use lora_plan::{MemoryRequirements, Plan, PlanError, PlanOptions, TooLarge};
use lora_proto::v1;
use lora_spec::{DeviceMemory, FieldError, JobSpec};
use tokio::sync::OwnedSemaphorePermit;

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
    let options = PlanOptions { cache: Some(store.token_cache()), ..PlanOptions::default() };
    Plan::new(job, &files, options).map_err(|error| match error {
        PlanError::Field(error) => error.into(),
        other => PlanFailure::Content(other.to_string()),
    })
}

/// The result of the validation of a job's inputs.
#[derive(Debug)]
pub(crate) enum ValidationOutcome {
    /// The reason why the job would fail.
    Problem(String),
    /// The job is valid.
    Valid {
        /// The memory that it needs. `None`: the base is not in the store, so it is not known.
        requirements: Option<Box<MemoryRequirements>>,
        /// Files of tokens that its inputs do not have yet.
        tokens: Vec<v1::StoredFile>,
        /// The notes of its plan.
        notes: Vec<String>,
    },
}

/// Validates a job's inputs, and stores their tokens.
pub(crate) async fn check(
    store: Store,
    job: JobSpec,
    inputs: v1::Inputs,
    permit: OwnedSemaphorePermit,
) -> ValidationOutcome {
    let (plan_store, plan_inputs) = (store.clone(), inputs.clone());
    let checked = tokio::task::spawn_blocking(move || {
        // A validation that is aborted keeps its permit while it reads data.
        let _permit = permit;
        checked_plan(&plan_store, &job, &plan_inputs)
    });
    let plan = match checked.await {
        Ok(Ok(Some(plan))) => plan,
        Ok(Ok(None)) => {
            return ValidationOutcome::Valid { requirements: None, tokens: Vec::new(), notes: Vec::new() };
        }
        Ok(Err(problem)) => return ValidationOutcome::Problem(problem),
        Err(error) => {
            return ValidationOutcome::Problem(format!("the inputs cannot be validated: {error}"));
        }
    };
    let mut tokens = Vec::new();
    for file in plan.token_files() {
        let name = file.name().file_name().unwrap_or_default().to_string_lossy().into_owned();
        if inputs.tokens.iter().chain(&tokens).any(|known| known.name == name) {
            continue;
        }
        match store.add_file(file.path()).await {
            Ok(digest) => tokens.push(v1::StoredFile { name, digest: Some(digest) }),
            // The workers can do without.
            Err(error) => tracing::warn!(%error, "cannot store the tokens of a dataset"),
        }
    }
    let Plan { requirements, notes, .. } = plan;
    ValidationOutcome::Valid { requirements: Some(Box::new(requirements)), tokens, notes }
}

/// Plans a job. `None` if its base is not in the store.
///
/// # Errors
/// The reason why the job would fail.
fn checked_plan(store: &Store, job: &JobSpec, inputs: &v1::Inputs) -> Result<Option<Plan>, String> {
    let plan = match plan(store, job, inputs) {
        Ok(plan) => plan,
        Err(PlanFailure::NoBase) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    if !plan.problems.is_empty() {
        let mut text = plan.problems.iter().take(SHOWN_PROBLEMS).cloned().collect::<Vec<_>>().join("\n");
        if plan.problems.len() > SHOWN_PROBLEMS {
            text += &format!("\nand {} more", plan.problems.len() - SHOWN_PROBLEMS);
        }
        return Err(text);
    }
    plan.check_workers(job.workers.max).map_err(|error| error.to_string())?;
    Ok(Some(plan))
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
