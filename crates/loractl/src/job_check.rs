//! Checks of a job file and of the files that it names, before anything starts.

use std::path::Path;

use anyhow::{Result, anyhow, bail};
use lora_data::check_data_file;
use lora_model::PeftAdapter;
use lora_plan::{Plan, PlanError, PlanOptions};
use lora_spec::{FieldError, JobFile, JobFiles, JobSpec, ModelConfig, WorkersSpec};
use lora_train::{TrainError, load_adapter};

use crate::token_cache::{self, TokenizingBar};

/// Plans the job of `file`. An error about a setting has its file and line.
pub(crate) fn plan(file: &JobFile, shown_rows: usize) -> Result<Plan> {
    if let Some(url) = file.job.model.base_url() {
        let message = format!("{url} is not on this machine; download it, and name its directory");
        return Err(file.locate(FieldError::new("model.base", message)).into());
    }
    check_base_exists(file)?;
    let files = JobFiles::from_job(&file.job);
    let progress = TokenizingBar::default();
    let show = |name: &Path, done: f64| progress.show(name, done);
    let cache = token_cache::of_user();
    let options = PlanOptions { shown_rows, cache: cache.as_ref(), progress: Some(&show) };
    let plan = Plan::new(&file.job, &files, options);
    progress.finish();
    let plan = plan.map_err(|error| match error {
        PlanError::Field(error) => file.locate(error).into(),
        other => anyhow::Error::from(other),
    })?;
    if let Some(dir) = &files.init_from {
        let config = ModelConfig::read(&files.base)?;
        load_adapter(dir, &file.job, &config).map_err(|error| match error {
            TrainError::Field(error) => file.locate(error).into(),
            other => anyhow::Error::from(other),
        })?;
    }
    Ok(plan)
}

/// Checks that the directory of the base exists. A missing relative path of two parts may be meant
/// as a name at the Hugging Face Hub.
fn check_base_exists(file: &JobFile) -> Result<()> {
    let base = &file.job.model.base;
    if base.is_dir() {
        return Ok(());
    }
    let mut message = format!("{} is not a directory", base.display());
    let relative = file.dir().and_then(|dir| base.strip_prefix(dir).ok());
    if let Some(name) = relative.filter(|path| path.iter().count() == 2) {
        message += &format!(
            "; for a model of the Hugging Face Hub write hf://{} (submitted jobs), or download it and name \
             its directory",
            name.display()
        );
    }
    Err(file.locate(FieldError::new("model.base", message)).into())
}

/// Reads the job at `path`, sets its number of workers, and checks it with its base and data.
pub(crate) fn load(path: &Path, workers: usize) -> Result<(JobFile, Plan)> {
    let (file, plan) = planned(path, workers)?;
    plan.check_workers(workers).map_err(|error| anyhow!("--workers: {}", error.message))?;
    Ok((file, plan))
}

/// Like [`load`], with the largest number of workers that can share the job, up to `max_workers`.
/// Also returns this number.
pub(crate) fn load_with_max_workers(path: &Path, max_workers: usize) -> Result<(JobFile, Plan, usize)> {
    let (mut file, plan) = planned(path, 1)?;
    let workers = max_workers.min(plan.micro_batches).max(1);
    file.job.workers = WorkersSpec { min: workers, max: workers };
    Ok((file, plan, workers))
}

fn planned(path: &Path, workers: usize) -> Result<(JobFile, Plan)> {
    let mut file = JobFile::read(path)?;
    file.job.workers = WorkersSpec { min: workers, max: workers };
    // The other settings were checked when the file was read.
    file.job.check().map_err(|error| anyhow!("--workers: {}", error.message))?;
    let plan = plan_without_problems(&file)?;
    Ok((file, plan))
}

/// Checks the job of `file` with its base and data.
pub(crate) fn check(file: &JobFile) -> Result<Plan> {
    let plan = plan_without_problems(file)?;
    plan.check_workers(file.job.workers.max).map_err(|error| file.locate(error))?;
    Ok(plan)
}

/// Checks the job of `file` as far as possible without its base: that its files exist.
pub(crate) fn check_without_base(file: &JobFile) -> Result<()> {
    let JobSpec { data, adapter, .. } = &file.job;
    let train = data.train.iter().map(|path| ("data.train", path));
    for (field, path) in train.chain(data.eval.as_ref().map(|path| ("data.eval", path))) {
        check_data_file(field, &path.into()).map_err(|error| file.locate(error))?;
    }
    match adapter.init_from.as_ref().map(|dir| PeftAdapter::read(&dir.into())) {
        Some(Err(error)) => Err(file.locate(FieldError::new("adapter.init_from", error.to_string())).into()),
        _ => Ok(()),
    }
}

/// Prints the plan's notes to stderr.
pub(crate) fn show_notes(plan: &Plan) {
    plan.notes.iter().for_each(|note| eprintln!("note: {note}"));
}

fn plan_without_problems(file: &JobFile) -> Result<Plan> {
    let plan = plan(file, 0)?;
    match plan.problems.first() {
        Some(problem) => bail!("{problem}"),
        None => Ok(plan),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(dir: &Path, base: &str, train: &str) -> JobFile {
        let text = format!("name: a\nmodel:\n  base: {base}\ndata:\n  train: {train}\n");
        JobFile::parse(&text, &dir.join("job.yaml")).unwrap()
    }

    #[test]
    fn a_missing_base_with_a_name_of_the_hub_has_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let error = |base: &str| plan(&job(dir.path(), base, "t.jsonl"), 0).unwrap_err().to_string();
        let name = error("meta-llama/Llama-3.2-1B");
        assert!(name.contains("job.yaml:3: model.base: ") && name.contains("is not a directory; "), "{name}");
        assert!(name.contains("hf://meta-llama/Llama-3.2-1B"), "{name}");
        for base in ["base", "/no/base", "a/b/c"] {
            let error = error(base);
            assert!(error.contains("is not a directory") && !error.contains("hf://"), "{error}");
        }
    }

    #[test]
    fn a_remote_base_is_not_planned_but_its_data_files_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let file = job(dir.path(), "hf://org/name", "train.jsonl");
        let error = plan(&file, 0).unwrap_err().to_string();
        assert!(error.contains("job.yaml:3: model.base: hf://org/name is not on this machine"), "{error}");
        let error = check_without_base(&file).unwrap_err().to_string();
        assert!(error.contains("job.yaml:5: data.train: the file"), "{error}");
        std::fs::write(dir.path().join("train.jsonl"), "{}").unwrap();
        check_without_base(&file).unwrap();
        std::fs::write(dir.path().join("train.json"), "{}").unwrap();
        check_without_base(&job(dir.path(), "hf://org/name", "train.json")).unwrap();
        std::fs::write(dir.path().join("train.txt"), "{}").unwrap();
        let error =
            check_without_base(&job(dir.path(), "hf://org/name", "train.txt")).unwrap_err().to_string();
        assert!(error.contains("job.yaml:5: data.train:") && error.contains(".parquet"), "{error}");
    }
}
