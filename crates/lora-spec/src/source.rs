//! The files that a job reads. Each has a name, by which users know it, and a path on this machine.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::JobSpec;

/// A file with its name in messages and its path on this machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceFile {
    name: PathBuf,
    path: PathBuf,
}

impl SourceFile {
    /// Creates a file that messages call `name`.
    pub fn new(name: impl Into<PathBuf>, path: impl Into<PathBuf>) -> Self {
        Self { name: name.into(), path: path.into() }
    }

    /// Creates a file that was uploaded as `uploaded` for the path `in_job` of a job. Its name is
    /// the path in the job. If the extensions differ, its name is `uploaded`, because the extension
    /// of a dataset's name determines the format.
    pub fn uploaded(in_job: &Path, uploaded: &str, path: impl Into<PathBuf>) -> Self {
        let is_same_format = in_job.extension() == Path::new(uploaded).extension();
        Self::new(if is_same_format { in_job } else { Path::new(uploaded) }, path)
    }

    /// Returns the name in messages.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Returns the path on this machine.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read, or is not a file: a pipe would wait for its writer.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        if !self.path.metadata()?.is_file() {
            return Err(io::Error::other("is not a file"));
        }
        std::fs::read(&self.path)
    }

    /// Reads the file as UTF-8, like [`Self::read`].
    pub fn read_to_string(&self) -> io::Result<String> {
        let text = String::from_utf8(self.read()?);
        text.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "is not UTF-8"))
    }

    /// Returns whether nothing has this path. A link to a missing file is not absent: a file that
    /// its owner meant to be there must not be ignored.
    pub fn is_absent(&self) -> bool {
        self.path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }
}

/// The name.
impl fmt::Display for SourceFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.display().fmt(f)
    }
}

/// A file whose name is its path.
impl<P: AsRef<Path>> From<P> for SourceFile {
    fn from(path: P) -> Self {
        Self::new(path.as_ref(), path.as_ref())
    }
}

/// A directory with its name in messages: a base or an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceDir {
    name: PathBuf,
    location: Location,
}

/// Where the files of a directory are on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Location {
    /// In this directory.
    Dir(PathBuf),
    /// At these paths, by their names in the directory.
    Files(Arc<BTreeMap<String, PathBuf>>),
}

impl SourceDir {
    /// Creates a directory that messages call `name`.
    pub fn new(name: impl Into<PathBuf>, path: impl Into<PathBuf>) -> Self {
        Self { name: name.into(), location: Location::Dir(path.into()) }
    }

    /// Creates a directory of files that are stored at other paths. The keys of `files` are their
    /// names in the directory.
    pub fn of_files(name: impl Into<PathBuf>, files: BTreeMap<String, PathBuf>) -> Self {
        Self { name: name.into(), location: Location::Files(Arc::new(files)) }
    }

    /// Returns the name in messages.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Returns whether the directory exists.
    pub fn exists(&self) -> bool {
        match &self.location {
            Location::Dir(path) => path.is_dir(),
            Location::Files(_) => true,
        }
    }

    /// Returns the file `name` of this directory, which may not exist.
    pub fn file(&self, name: impl AsRef<Path>) -> SourceFile {
        let name = name.as_ref();
        let path = match &self.location {
            Location::Dir(path) => path.join(name),
            // An empty path is a file that does not exist.
            Location::Files(files) => {
                name.to_str().and_then(|name| files.get(name)).cloned().unwrap_or_default()
            }
        };
        SourceFile::new(self.name.join(name), path)
    }
}

/// The name.
impl fmt::Display for SourceDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.display().fmt(f)
    }
}

/// A directory whose name is its path.
impl<P: AsRef<Path>> From<P> for SourceDir {
    fn from(path: P) -> Self {
        Self::new(path.as_ref(), path.as_ref())
    }
}

/// The files of a job on this machine. The paths in the job are those of the machine on which the
/// job was written; here they are only names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobFiles {
    /// The base of `model.base`.
    pub base: SourceDir,
    /// The files of `data.train`, in this order.
    pub train: Vec<SourceFile>,
    /// The rows of `data.eval`; set if and only if the job has evaluation rows.
    pub eval: Option<SourceFile>,
    /// The adapter of `adapter.init_from`; set if and only if the job has this setting.
    pub init_from: Option<SourceDir>,
    /// Token files of the datasets, by name, which make it unnecessary to tokenize them.
    pub tokens: Option<SourceDir>,
}

impl JobFiles {
    /// Returns the files of a job that was written on this machine: those at the paths in the job.
    pub fn from_job(job: &JobSpec) -> Self {
        Self {
            base: (&job.model.base).into(),
            train: job.data.train.iter().map(Into::into).collect(),
            eval: job.data.eval.as_ref().map(Into::into),
            init_from: job.adapter.init_from.as_ref().map(Into::into),
            tokens: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uploaded_file_has_the_name_in_the_job_if_the_format_is_the_same() {
        let name =
            |in_job: &str, uploaded| SourceFile::uploaded(Path::new(in_job), uploaded, "/x").to_string();
        assert_eq!(name("/data/my rows.jsonl", "my_rows.jsonl"), "/data/my rows.jsonl");
        assert_eq!(name("train", "rows.parquet"), "rows.parquet");
        assert_eq!(name("rows.jsonl", "rows.parquet"), "rows.parquet");
    }

    #[test]
    fn a_directory_of_files_reads_like_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        for name in ["a", "sub/c", "sub/b"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let files = ["a", "sub/c", "sub/b"].map(|name| (name.to_owned(), dir.path().join(name)));
        for source in [SourceDir::new("base", dir.path()), SourceDir::of_files("base", BTreeMap::from(files))]
        {
            assert!(source.exists());
            assert_eq!(source.file("a").name(), Path::new("base/a"));
            assert_eq!(std::fs::read_to_string(source.file("sub/b").path()).unwrap(), "sub/b");
            let missing = std::fs::read(source.file("d").path()).unwrap_err();
            assert_eq!(missing.kind(), io::ErrorKind::NotFound);
            assert!(source.file("d").is_absent() && !source.file("a").is_absent());
        }
        assert!(!SourceDir::new("base", dir.path().join("a")).exists());
    }
}
