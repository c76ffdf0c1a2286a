//! The files that a job reads, for the upload to the coordinator.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use lora_data::Tokenizer;
use lora_proto::DigestBuilder;
use lora_proto::file_name::{MAX_NAME_BYTES, is_file_name_char};
use lora_proto::v1::{self, base};
use lora_spec::{FieldError, JobFile, SafetensorsIndex, SourceDir, SourceFile, file_names};

use crate::output::bytes;

/// The files of an adapter.
const ADAPTER_FILES: [&str; 2] = [file_names::ADAPTER_CONFIG, file_names::ADAPTER_WEIGHTS];
/// Files of a base that are optional.
const OPTIONAL_BASE_FILES: [&str; 2] = [file_names::MODEL_WEIGHTS_INDEX, file_names::GENERATION_CONFIG];

/// Where workers get the base from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum BaseLocation {
    /// From the coordinator's store, after an upload from this directory.
    Uploaded(PathBuf),
    /// From a hub or an object store.
    Url(String),
    /// From this path on their own disks.
    Path(PathBuf),
}

/// A local file, with its name and digest in the store.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LocalFile {
    pub(crate) path: PathBuf,
    pub(crate) stored: v1::StoredFile,
}

/// The files of a job, with their digests.
#[derive(Debug)]
pub(crate) struct JobUpload {
    base: base::Source,
    files: Vec<LocalFile>,
    train: Vec<v1::StoredFile>,
    eval: Option<v1::StoredFile>,
    init_from: Vec<v1::StoredFile>,
    tokens: Vec<v1::StoredFile>,
}

impl BaseLocation {
    /// Chooses how the workers get the base of `file`. A base is uploaded if all its files together
    /// have at most `max_upload` bytes. If not, a message on stderr describes where the workers
    /// need it.
    pub(crate) fn choose(file: &JobFile, job_dir: &Path, max_upload: u64) -> Result<Self> {
        if let Some(url) = file.job.model.base_url() {
            return Ok(Self::Url(url.to_owned()));
        }
        let dir = &file.job.model.base;
        if !dir.is_dir() {
            // A path below the job file's directory is meant for this machine.
            if dir.starts_with(job_dir) {
                let message = format!("the directory {} does not exist", dir.display());
                return Err(file.locate(FieldError::new("model.base", message)).into());
            }
            eprintln!("{} is not on this machine; each worker needs it under its model_roots", dir.display());
            return Ok(Self::Path(dir.clone()));
        }
        let size = base_files(&dir.into())?.iter().map(|(_, file)| size(file)).sum::<Result<u64>>()?;
        if size > max_upload {
            eprintln!(
                "{} has {}, more than --max-upload {}: it is not uploaded, and each worker needs it under \
                 its model_roots",
                dir.display(),
                bytes(size),
                bytes(max_upload)
            );
            return Ok(Self::Path(dir.clone()));
        }
        Ok(Self::Uploaded(dir.clone()))
    }
}

impl JobUpload {
    /// Reads and hashes the files of the job of `file` and the files with the tokens of its
    /// datasets, and shows the progress on `bar`. Blocks.
    pub(crate) fn collect<'a>(
        file: &JobFile,
        base: BaseLocation,
        tokens: impl IntoIterator<Item = &'a SourceFile>,
        bar: &ProgressBar,
    ) -> Result<Self> {
        let job = &file.job;
        let mut files = Vec::new();
        let mut take = |name: String, path: &Path| -> Result<v1::StoredFile> {
            bar.set_message(format!("hashing {name}"));
            let digest = DigestBuilder::of_file(path).with_context(|| path.display().to_string())?;
            bar.inc(digest.size);
            let stored = v1::StoredFile { name, digest: Some(digest) };
            files.push(LocalFile { path: path.to_owned(), stored: stored.clone() });
            Ok(stored)
        };
        let base = match base {
            BaseLocation::Uploaded(dir) => {
                let files = base_files(&dir.as_path().into())?
                    .into_iter()
                    .map(|(name, file)| take(name, file.path()));
                base::Source::Files(v1::FileSet { files: files.collect::<Result<_>>()? })
            }
            BaseLocation::Url(url) => base::Source::Url(url),
            BaseLocation::Path(path) => {
                let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
                base::Source::Path(text.to_owned())
            }
        };
        let train = job.data.train.iter().map(|path| take(store_name(path), path)).collect::<Result<_>>()?;
        let eval = job.data.eval.as_ref().map(|path| take(store_name(path), path)).transpose()?;
        let init_from =
            job.adapter.init_from.iter().flat_map(|dir| ADAPTER_FILES.map(|name| (name, dir.join(name))));
        let init_from = init_from.map(|(name, path)| take(name.into(), &path)).collect::<Result<_>>()?;
        let mut stored: Vec<v1::StoredFile> = Vec::new();
        for path in tokens.into_iter().map(SourceFile::path) {
            let name = store_name(path);
            if stored.iter().all(|known| known.name != name) {
                stored.push(take(name, path)?);
            }
        }
        Ok(Self { base, files, train, eval, init_from, tokens: stored })
    }

    /// The inputs as a message of the protocol.
    pub(crate) fn message(&self) -> v1::Inputs {
        v1::Inputs {
            base: Some(v1::Base { source: Some(self.base.clone()) }),
            train: self.train.clone(),
            eval: self.eval.clone(),
            init_from: self.init_from.clone(),
            tokens: self.tokens.clone(),
        }
    }

    /// The files that must be in the store.
    pub(crate) fn files(&self) -> &[LocalFile] {
        &self.files
    }

    /// Checks that all files have the contents that they have in `earlier`.
    ///
    /// # Errors
    /// Names the setting and the first file with other contents.
    pub(crate) fn check_unchanged(&self, earlier: &v1::Inputs) -> Result<(), FieldError> {
        for (setting, now, then) in [
            ("data.train", self.train.as_slice(), earlier.train.as_slice()),
            ("data.eval", self.eval.as_slice(), earlier.eval.as_slice()),
            ("adapter.init_from", &self.init_from, &earlier.init_from),
        ] {
            let mut digests = then.iter().map(|file| &file.digest);
            let changed = now.iter().find(|file| digests.next() != Some(&file.digest));
            if let Some(file) = changed {
                let message = format!(
                    "{} has other contents than when the run was started; restore them, or start a new run",
                    file.name
                );
                return Err(FieldError::new(setting, message));
            }
        }
        Ok(())
    }
}

/// Returns the files of a base that a worker needs, with their names in the store.
fn base_files(dir: &SourceDir) -> Result<Vec<(String, SourceFile)>> {
    let checkpoint = SafetensorsIndex::open(dir)?;
    // The index of the checkpoint has these names, so the files cannot be renamed.
    if let Some(file) = checkpoint.files.iter().find(|file| !file.name().ends_with(store_name(file.name()))) {
        bail!("{file}: cannot upload a file of this name; use only letters, digits, '-', '_' and '.'");
    }
    let tokenizer = Tokenizer::load(dir)?;
    let optional =
        OPTIONAL_BASE_FILES.map(|name| dir.file(name)).into_iter().filter(|file| file.path().is_file());
    let mut files: Vec<(String, SourceFile)> = std::iter::once(dir.file(file_names::MODEL_CONFIG))
        .chain(checkpoint.files)
        .chain(optional)
        .map(|file| (store_name(file.name()), file))
        .collect();
    files.extend(tokenizer.files().iter().cloned());
    Ok(files)
}

/// Returns a valid name for the store that keeps the end of the file name.
fn store_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut name: String = name.chars().map(|c| if is_file_name_char(c) { c } else { '_' }).collect();
    name = name.trim_start_matches('.').to_owned();
    let surplus = name.len().saturating_sub(MAX_NAME_BYTES);
    name.drain(..surplus);
    name.trim_start_matches('.').to_owned()
}

fn size(file: &SourceFile) -> Result<u64> {
    Ok(file.path().metadata().with_context(|| file.to_string())?.len())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn example() -> PathBuf {
        lora_test_kit::example("job.yaml")
    }

    fn with_base(base: &str, dir: &Path) -> JobFile {
        let text = format!("name: a\nmodel:\n  base: {base}\ndata:\n  train: t.jsonl\n");
        JobFile::parse(&text, &dir.join("job.yaml")).unwrap()
    }

    #[test]
    fn store_names_are_sanitized() {
        for (path, name) in [
            ("/a/train.jsonl", "train.jsonl"),
            ("/a/my data (1).jsonl", "my_data__1_.jsonl"),
            ("/a/..hidden.parquet", "hidden.parquet"),
            ("/a/données.jsonl", "donn_es.jsonl"),
        ] {
            assert_eq!(store_name(Path::new(path)), name);
        }
        let long = store_name(Path::new(&format!("/a/{}.jsonl", "x".repeat(300))));
        assert!(long.len() == 255 && long.ends_with("x.jsonl"), "{long}");
    }

    #[test]
    fn only_small_local_bases_are_uploaded() {
        let dir = tempfile::tempdir().unwrap();
        let example = example();
        let base = example.with_file_name("base");
        let file = with_base(base.to_str().unwrap(), dir.path());
        let choose = |file: &JobFile, max| BaseLocation::choose(file, dir.path(), max);
        assert_eq!(choose(&file, 1 << 30).unwrap(), BaseLocation::Uploaded(base.clone()));
        assert_eq!(choose(&file, 1000).unwrap(), BaseLocation::Path(base));
        let url = with_base("hf://org/name@main", dir.path());
        assert_eq!(choose(&url, 0).unwrap(), BaseLocation::Url("hf://org/name@main".into()));
        assert_eq!(
            choose(&with_base("/nowhere/base", dir.path()), 0).unwrap(),
            BaseLocation::Path("/nowhere/base".into())
        );
        let error = choose(&with_base("nowhere", dir.path()), 0).unwrap_err().to_string();
        assert!(error.contains("job.yaml:3: model.base: the directory"), "{error}");
    }

    #[test]
    fn only_the_jobs_files_are_hashed() {
        let dir = tempfile::tempdir().unwrap();
        let example = example();
        for entry in fs::read_dir(example.with_file_name("base")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        let template = dir.path().join("chat_template.jinja");
        let named = dir.path().join("additional_chat_templates");
        fs::create_dir(&named).unwrap();
        fs::rename(&template, named.join("default.jinja")).unwrap();
        fs::write(dir.path().join("pytorch_model.bin"), "not wanted").unwrap();
        let mut file = JobFile::read(&example).unwrap();
        file.job.model.base = dir.path().to_owned();
        let inputs = JobUpload::collect(
            &file,
            BaseLocation::Uploaded(dir.path().to_owned()),
            [],
            &ProgressBar::hidden(),
        )
        .unwrap();
        let message = inputs.message();
        let Some(base::Source::Files(set)) = message.base.unwrap().source else { panic!("no files") };
        let mut names: Vec<&str> = set.files.iter().map(|file| file.name.as_str()).collect();
        names.sort();
        let mut expected = vec![
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ];
        expected.extend(OPTIONAL_BASE_FILES.iter().filter(|name| dir.path().join(name).is_file()));
        expected.sort();
        assert_eq!(names, expected);
        let train = DigestBuilder::of_file(&file.job.data.train[0]).unwrap();
        assert_eq!(message.train[0].digest, Some(train));
        assert!(message.eval.is_some() && message.init_from.is_empty());
        assert_eq!(inputs.files().len(), names.len() + 2);
    }

    #[test]
    fn changed_data_is_detected() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("t.jsonl"), "one").unwrap();
        let file = with_base("/base", dir.path());
        let collect = || {
            JobUpload::collect(&file, BaseLocation::Path("/base".into()), [], &ProgressBar::hidden()).unwrap()
        };
        let first = collect();
        assert_eq!(collect().check_unchanged(&first.message()), Ok(()));
        fs::write(dir.path().join("t.jsonl"), "two").unwrap();
        let changed = collect().check_unchanged(&first.message()).unwrap_err().to_string();
        assert!(changed.starts_with("data.train: t.jsonl has other contents than when"), "{changed}");
    }
}
