//! The input files of a job: checks of their names and digests, and a directory with links to them
//! under those names.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use lora_proto::file_name::{MAX_NAME_BYTES, is_file_name};
use lora_proto::v1::{self, base};
use lora_spec::{FieldError, JobSpec};
use tempfile::TempDir;

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
    check_file("inputs.train", inputs.train.as_ref().ok_or_else(|| missing("inputs.train"))?)?;
    if let Some(eval) = &inputs.eval {
        check_file("inputs.eval", eval)?;
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

/// The digest of every stored file that the inputs name.
pub(crate) fn digests(inputs: &v1::Inputs) -> Vec<v1::FileDigest> {
    files(inputs).filter_map(|file| file.digest.clone()).collect()
}

/// A directory with links into the store, one for each input of a job, under the input's name. The
/// directory is removed on drop.
pub(crate) struct JobInputs {
    dir: TempDir,
    /// The job, with the paths of the links as its paths.
    pub(crate) job: JobSpec,
}

impl JobInputs {
    /// Creates the links. Returns `None` if the base is not in the store. Blocks.
    pub(crate) fn new(store: &Store, job: &JobSpec, inputs: &v1::Inputs) -> io::Result<Option<Self>> {
        let Some(base::Source::Files(set)) = inputs.base.as_ref().and_then(|base| base.source.as_ref())
        else {
            return Ok(None);
        };
        let dir = TempDir::new_in(store.staging_dir())?;
        let mut job = job.clone();
        let link_all = |section: &str, files: &[&v1::StoredFile]| -> io::Result<PathBuf> {
            let to = dir.path().join(section);
            std::fs::create_dir(&to)?;
            for file in files {
                let sha256 = file.digest.as_ref().map_or(&[][..], |digest| &digest.sha256);
                let object = store.object_path(sha256).ok_or_else(|| io::Error::other("not a SHA-256"))?;
                symlink(object, to.join(&file.name))?;
            }
            Ok(to)
        };
        let link_one = |section: &str, file: &v1::StoredFile| {
            Ok::<_, io::Error>(link_all(section, &[file])?.join(&file.name))
        };
        job.model.base = link_all("base", &set.files.iter().collect::<Vec<_>>())?;
        if let Some(train) = &inputs.train {
            job.data.train = link_one("train", train)?;
        }
        if let Some(eval) = &inputs.eval {
            job.data.eval = Some(link_one("eval", eval)?);
        }
        if !inputs.init_from.is_empty() {
            let files: Vec<&v1::StoredFile> = inputs.init_from.iter().collect();
            job.adapter.init_from = Some(link_all("init_from", &files)?);
        }
        Ok(Some(Self { dir, job }))
    }

    /// Replaces the paths of the links in `text` by the names of the files.
    pub(crate) fn with_job_names(&self, text: &str) -> String {
        let dir = self.dir.path().display();
        let mut plain = text.to_owned();
        for section in ["train", "eval"] {
            plain = plain.replace(&format!("{dir}/{section}/"), "");
        }
        plain.replace(&format!("{dir}/"), "")
    }
}

fn files(inputs: &v1::Inputs) -> impl Iterator<Item = &v1::StoredFile> {
    let base = match inputs.base.as_ref().and_then(|base| base.source.as_ref()) {
        Some(base::Source::Files(set)) => set.files.as_slice(),
        _ => &[],
    };
    base.iter().chain(&inputs.train).chain(&inputs.eval).chain(&inputs.init_from)
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
    if !is_file_name(&file.name) {
        let message = format!(
            "{:?} is not a file name: 1 to {MAX_NAME_BYTES} letters, digits, '-', '_' or '.', \
             not starting with a dot",
            file.name
        );
        return Err(FieldError::new(&format!("{field}.name"), message));
    }
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
