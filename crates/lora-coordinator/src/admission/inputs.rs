//! The input files of a job: checks of their names and digests, and where they are in the store.

use std::collections::BTreeSet;
use std::path::Path;

use lora_proto::file_name::check_file_name;
use lora_proto::v1::{self, base};
use lora_spec::{FieldError, JobFiles, JobSpec, SourceDir, SourceFile};

use crate::store::Store;

/// The largest number of files in one set.
const MAX_FILES: usize = 4096;

/// Checks the inputs of `job`: the required ones are present, and names and digests are well
/// formed.
///
/// # Errors
/// The first invalid field.
pub(crate) fn check(inputs: &v1::Inputs, job: &JobSpec) -> Result<(), FieldError> {
    let missing = |field: &str| FieldError::new(field, "is missing".into());
    let source = inputs.base.as_ref().and_then(|base| base.source.as_ref());
    match source.ok_or_else(|| missing("inputs.base"))? {
        base::Source::Files(set) => check_set("inputs.base.files", &set.files)?,
        base::Source::Url(url) => {
            if url.len() > 2048 || !url.contains("://") {
                let message = format!("{url:?} is not a URL such as hf://org/name or s3://bucket/prefix");
                return Err(FieldError::new("inputs.base.url", message));
            }
        }
        base::Source::Path(path) => {
            if path.len() > 4096 || !Path::new(path).is_absolute() {
                let message = format!("{path:?} is not an absolute path");
                return Err(FieldError::new("inputs.base.path", message));
            }
        }
    }
    if inputs.train.is_empty() {
        return Err(missing("inputs.train"));
    }
    if inputs.train.len() != job.data.train.len() {
        let message =
            format!("has {} files, but data.train has {}", inputs.train.len(), job.data.train.len());
        return Err(FieldError::new("inputs.train", message));
    }
    for (index, file) in inputs.train.iter().enumerate() {
        check_file(&format!("inputs.train[{index}]"), file)?;
    }
    if let Some(eval) = &inputs.eval {
        check_file("inputs.eval", eval)?;
    }
    if !inputs.tokens.is_empty() {
        check_set("inputs.tokens", &inputs.tokens)?;
    }
    for (field, given, wanted, setting) in [
        ("inputs.eval", inputs.eval.is_some(), job.data.eval.is_some(), "data.eval"),
        (
            "inputs.init_from",
            !inputs.init_from.is_empty(),
            job.adapter.init_from.is_some(),
            "adapter.init_from",
        ),
    ] {
        match (given, wanted) {
            (true, false) => {
                return Err(FieldError::new(field, format!("is given, but {setting} is not set")));
            }
            (false, true) => return Err(FieldError::new(field, format!("is missing, but {setting} is set"))),
            _ => {}
        }
    }
    if job.adapter.init_from.is_some() {
        check_set("inputs.init_from", &inputs.init_from)?;
    }
    Ok(())
}

/// Returns the stored files of `job`, under their names in the job. `None` if the base is not in
/// the store.
pub(crate) fn job_files(store: &Store, job: &JobSpec, inputs: &v1::Inputs) -> Option<JobFiles> {
    let base::Source::Files(set) = inputs.base.as_ref()?.source.as_ref()? else { return None };
    // A file without a SHA-256, which `check` refuses, has an empty path, which does not exist.
    let path = |file: &v1::StoredFile| {
        file.digest.as_ref().and_then(|digest| store.object_path(&digest.sha256)).unwrap_or_default()
    };
    let file = |in_job: &Path, file: &v1::StoredFile| SourceFile::uploaded(in_job, &file.name, path(file));
    let dir = |in_job: &Path, files: &[v1::StoredFile]| {
        SourceDir::of_files(in_job, files.iter().map(|file| (file.name.clone(), path(file))).collect())
    };
    Some(JobFiles {
        base: dir(&job.model.base, &set.files),
        train: job.data.train.iter().zip(&inputs.train).map(|(in_job, train)| file(in_job, train)).collect(),
        eval: job.data.eval.as_ref().zip(inputs.eval.as_ref()).map(|(in_job, eval)| file(in_job, eval)),
        init_from: job.adapter.init_from.as_ref().map(|in_job| dir(in_job, &inputs.init_from)),
        tokens: Some(dir(Path::new("inputs.tokens"), &inputs.tokens)),
    })
}

fn check_set(field: &str, files: &[v1::StoredFile]) -> Result<(), FieldError> {
    if files.is_empty() || files.len() > MAX_FILES {
        let message = format!("has {} files; it must have 1 to {MAX_FILES}", files.len());
        return Err(FieldError::new(field, message));
    }
    let mut names = BTreeSet::new();
    for (index, file) in files.iter().enumerate() {
        let field = format!("{field}[{index}]");
        check_file(&field, file)?;
        if !names.insert(&file.name) {
            return Err(FieldError::new(&format!("{field}.name"), format!("{:?} is given twice", file.name)));
        }
    }
    Ok(())
}

fn check_file(field: &str, file: &v1::StoredFile) -> Result<(), FieldError> {
    check_file_name(&file.name).map_err(|message| FieldError::new(&format!("{field}.name"), message))?;
    check_digest(&format!("{field}.digest"), file.digest.as_ref()).map(drop)
}

/// Returns the digest if it is present and has the length of a SHA-256.
pub(crate) fn check_digest<'a>(
    field: &str,
    digest: Option<&'a v1::FileDigest>,
) -> Result<&'a v1::FileDigest, FieldError> {
    let digest = digest.ok_or_else(|| FieldError::new(field, "is missing".into()))?;
    if digest.sha256.len() != 32 {
        let message = format!("has {} bytes; a SHA-256 has 32", digest.sha256.len());
        return Err(FieldError::new(&format!("{field}.sha256"), message));
    }
    Ok(digest)
}
