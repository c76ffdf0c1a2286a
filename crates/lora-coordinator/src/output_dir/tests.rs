use std::path::PathBuf;

use super::*;

fn job() -> JobSpec {
    let mut job = JobSpec { name: "dates".into(), ..JobSpec::default() };
    job.model.base = "/base".into();
    job.data.train = "/train.jsonl".into();
    job
}

fn stage(dir: &OutputDir, name: &str) -> PathBuf {
    let path = dir.staging_path(1, name);
    fs::write(&path, name).unwrap();
    path
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_written_job_reads_back_as_it_was() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("new/out");
    let mut job = job();
    job.adapter.target_modules = lora_spec::TargetModules::Names(vec!["q_proj".into()]);
    job.training.early_stopping_threshold = 1e-9;
    OutputDir::create(&path, &job).unwrap();
    assert_eq!(lora_spec::JobFile::read(&path.join("job.yaml")).unwrap().job, job);
}

#[test]
fn the_newest_checkpoints_are_kept_and_torn_ones_ignored() {
    let temp = tempfile::tempdir().unwrap();
    let dir = OutputDir::create(temp.path(), &job()).unwrap();
    assert_eq!(dir.newest_checkpoint().unwrap(), None);
    for step in [9, 10, 11, 100_000_000] {
        dir.commit_checkpoint(&stage(&dir, "c"), step, 2).unwrap();
    }
    stage(&dir, &checkpoint_name(12));
    fs::write(temp.path().join("checkpoints/step-00000013.safetensors.part"), "torn").unwrap();
    assert_eq!(
        names(&temp.path().join("checkpoints")),
        ["step-00000011.safetensors", "step-00000013.safetensors.part", "step-100000000.safetensors"]
    );
    assert_eq!(dir.newest_checkpoint().unwrap(), Some(100_000_000));
    drop(dir);
    let dir = OutputDir::reopen(temp.path(), &job()).unwrap();
    assert_eq!(dir.newest_checkpoint().unwrap(), Some(100_000_000));
    assert!(names(&temp.path().join(".staging")).is_empty());
}

#[test]
fn a_result_marks_the_directory_as_finished() {
    let temp = tempfile::tempdir().unwrap();
    let dir = OutputDir::create(temp.path(), &job()).unwrap();
    let files = ["adapter_model.safetensors", RECEIPT, "tokenizer.json"]
        .map(|name| (name.to_owned(), stage(&dir, name)))
        .into();
    dir.commit_result(&files).unwrap();
    drop(dir);
    for resume in [false, true] {
        assert!(matches!(check_output_dir(temp.path(), resume), Err(OutputError::HoldsResult(_))));
    }
    assert!(!temp.path().join(".staging").exists() && temp.path().join("tokenizer.json").exists());
}

#[test]
fn an_unfinished_run_is_only_touched_to_resume_it() {
    let temp = tempfile::tempdir().unwrap();
    assert!(matches!(check_output_dir(temp.path(), true), Err(OutputError::NothingToResume(_))));
    drop(OutputDir::create(temp.path(), &job()).unwrap());
    assert!(matches!(check_output_dir(temp.path(), false), Err(OutputError::HoldsRun(_))));
    assert!(matches!(OutputDir::create(temp.path(), &job()), Err(OutputError::HoldsRun(_))));
    check_output_dir(temp.path(), true).unwrap();
}

#[test]
fn resuming_with_other_settings_names_the_first_that_differs() {
    let temp = tempfile::tempdir().unwrap();
    drop(OutputDir::create(temp.path(), &job()).unwrap());
    let mut other = job();
    other.workers.max = 4;
    drop(OutputDir::reopen(temp.path(), &other).unwrap());
    other.training.learning_rate = 0.5;
    let error = OutputDir::reopen(temp.path(), &other).unwrap_err().to_string();
    assert!(error.contains("training.learning_rate: is 0.5, and was 0.0002"), "{error}");
}

#[test]
fn two_runs_do_not_share_a_directory() {
    let temp = tempfile::tempdir().unwrap();
    let first = OutputDir::create(temp.path(), &job()).unwrap();
    assert!(matches!(OutputDir::reopen(temp.path(), &job()), Err(OutputError::InUse(_))));
    drop(first);
    OutputDir::reopen(temp.path(), &job()).unwrap();
}

#[test]
fn a_foreign_adapter_is_not_overwritten() {
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("adapter_model.safetensors"), "theirs").unwrap();
    assert!(matches!(check_output_dir(temp.path(), false), Err(OutputError::InTheWay(_))));
}
