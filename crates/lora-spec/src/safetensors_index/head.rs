//! A head that is stored although `config.json` says that it is the embedding.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{HEAD, SafetensorsError, SafetensorsIndex, TensorEntry};
use crate::ModelConfig;

/// Number of bytes that are compared at a time.
const CHUNK_BYTES: u64 = 1 << 20;

impl SafetensorsIndex {
    /// Sets `tie_word_embeddings` of `model` to false if the files have a head that differs from
    /// the embedding, as Transformers 5 does. Returns whether it was changed.
    ///
    /// The bytes are compared. A head with equal values of another type stays a weight of its own,
    /// which gives the same logits.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn untie_head(&self, model: &mut ModelConfig) -> Result<bool, SafetensorsError> {
        let (head, embedding) = (self.tensors.get(HEAD), self.tensors.get("model.embed_tokens.weight"));
        let (true, Some(head), Some(embedding)) = (model.tie_word_embeddings, head, embedding) else {
            return Ok(false);
        };
        if self.is_equal(head, embedding).map_err(|error| self.fail(head, error.to_string()))? {
            return Ok(false);
        }
        model.tie_word_embeddings = false;
        Ok(true)
    }

    /// Compares two tensors up to the first difference.
    fn is_equal(&self, a: &TensorEntry, b: &TensorEntry) -> io::Result<bool> {
        if (&a.dtype, &a.shape) != (&b.dtype, &b.shape) {
            return Ok(false);
        }
        let open = |entry: &TensorEntry| File::open(self.files[entry.file].path());
        let (file_a, file_b) = (open(a)?, open(b)?);
        let length = a.bytes.end - a.bytes.start;
        let mut buffers = [vec![0; CHUNK_BYTES as usize], vec![0; CHUNK_BYTES as usize]];
        for at in (0..length).step_by(CHUNK_BYTES as usize) {
            let size = CHUNK_BYTES.min(length - at) as usize;
            let [chunk_a, chunk_b] = &mut buffers;
            file_a.read_exact_at(&mut chunk_a[..size], a.bytes.start + at)?;
            file_b.read_exact_at(&mut chunk_b[..size], b.bytes.start + at)?;
            if chunk_a[..size] != chunk_b[..size] {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
