//! A job file, and what it names on this machine, checked before anything starts.

use std::path::Path;

use anyhow::{anyhow, bail};
use lora_data::{Plan, PlanError};
use lora_spec::{JobFile, JobSpec, ModelConfig, WorkersSpec};
use lora_train::{TrainError, initial_adapter};

/// Plans the job of `file`; an error about a setting names its line.
pub(crate) fn plan(file: &JobFile) -> anyhow::Result<Plan> {
    let plan = Plan::new(&file.job).map_err(|error| match error {
        PlanError::Field(error) => file.locate(error).into(),
        other => anyhow::Error::from(other),
    })?;
    if file.job.adapter.init_from.is_some() {
        let config = ModelConfig::read(&file.job.model.base)?;
        initial_adapter(&file.job, &config).map_err(|error| match error {
            TrainError::Field(error) => file.locate(error).into(),
            other => anyhow::Error::from(other),
        })?;
    }
    Ok(plan)
}

/// Reads the job at `path`, sets its number of workers, and checks it with its base and data.
pub(crate) fn load(path: &Path, workers: usize) -> anyhow::Result<JobSpec> {
    let mut file = JobFile::read(path)?;
    file.job.workers = WorkersSpec { min: workers, max: workers };
    // The rest of the job was checked as the file has it.
    file.job.check().map_err(|error| anyhow!("--workers: {}", error.message))?;
    let plan = plan(&file)?;
    if let Some(problem) = plan.problems.into_iter().next() {
        bail!(problem);
    }
    if workers > plan.micro_batches {
        let rows = plan.train.report.rows_kept;
        bail!(
            "--workers: {workers} are more than the {} micro-batches that {rows} rows make",
            plan.micro_batches
        );
    }
    Ok(file.job)
}
