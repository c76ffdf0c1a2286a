//! The files of `data.train`.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The files of `data.train`: in a job file, a path or a list of paths.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrainFiles(Vec<PathBuf>);

impl Deref for TrainFiles {
    type Target = [PathBuf];

    fn deref(&self) -> &[PathBuf] {
        &self.0
    }
}

impl DerefMut for TrainFiles {
    fn deref_mut(&mut self) -> &mut [PathBuf] {
        &mut self.0
    }
}

impl<P: Into<PathBuf>> From<P> for TrainFiles {
    fn from(path: P) -> Self {
        Self(vec![path.into()])
    }
}

impl FromIterator<PathBuf> for TrainFiles {
    fn from_iter<I: IntoIterator<Item = PathBuf>>(paths: I) -> Self {
        Self(paths.into_iter().collect())
    }
}

/// One path is written as such, so that the hashes of a job with one file do not change.
impl Serialize for TrainFiles {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [] => Path::new("").serialize(serializer),
            [path] => path.serialize(serializer),
            paths => paths.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TrainFiles {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PathsVisitor)
    }
}

struct PathsVisitor;

impl<'de> Visitor<'de> for PathsVisitor {
    type Value = TrainFiles;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path or a list of paths")
    }

    fn visit_str<E>(self, path: &str) -> Result<TrainFiles, E> {
        Ok(if path.is_empty() { TrainFiles::default() } else { path.into() })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<TrainFiles, A::Error> {
        let mut paths = Vec::new();
        while let Some(path) = list.next_element()? {
            paths.push(path);
        }
        Ok(TrainFiles(paths))
    }
}
