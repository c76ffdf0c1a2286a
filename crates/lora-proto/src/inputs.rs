//! The files that the inputs of a job name.

use crate::v1::{self, base};

impl v1::Inputs {
    /// The stored files of the base, the data, the initial adapter and the tokens, in this order.
    pub fn files(&self) -> impl Iterator<Item = &v1::StoredFile> {
        let base = match self.base.as_ref().and_then(|base| base.source.as_ref()) {
            Some(base::Source::Files(set)) => set.files.as_slice(),
            _ => &[],
        };
        base.iter().chain(&self.train).chain(&self.eval).chain(&self.init_from).chain(&self.tokens)
    }

    /// The digests of [`files`](Self::files).
    pub fn digests(&self) -> Vec<v1::FileDigest> {
        self.files().filter_map(|file| file.digest.clone()).collect()
    }
}
